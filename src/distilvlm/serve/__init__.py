"""Models that answer: an engine that decodes many requests together, and what is put in front of it.

Read `interface.py` first, then `local.py`; `loading.engine` makes an engine of what lies on disk.
"""
