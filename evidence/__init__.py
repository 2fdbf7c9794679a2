"""What each method is worth, measured: one command per table. Read `tables.py` first, then `verdicts.py`."""
