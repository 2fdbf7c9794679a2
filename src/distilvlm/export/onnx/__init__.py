"""ONNX for onnxruntime, in the files and names that transformers.js reads (graphs.py), asked in it (runtime.py)."""
