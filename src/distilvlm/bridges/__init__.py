"""Models as other people's programs load them, in their environment: `lmms_eval.py`."""
