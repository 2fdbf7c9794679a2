"""GGUF for llama.cpp: language model (language.py, vocabulary.py) and tower (tower.py), asked in it (speaker.py)."""
