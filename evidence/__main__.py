"""python -m evidence TABLE [--seeds N] [--dir DIR]: makes one table, records its seeds and writes the page anew.

The same command continues what was interrupted. `python -m evidence page` only writes the page; `--recorded` records a
comparison that is finished in DIR, without making anything.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distilvlm.compare import compare

from . import page
from .results import record
from .tables import ROOT, TABLES


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/evidence", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", choices=[*TABLES, "page"])
    parser.add_argument("--seeds", type=int, default=1, help="how many; three decide (verdicts.py)")
    parser.add_argument("--dir", type=Path, help="where runs go; default runs/TABLE")
    parser.add_argument("--recorded", action="store_true", help="record what is finished in DIR; make nothing")
    asked = parser.parse_args()
    if asked.table != "page":
        table = TABLES[asked.table]
        directory = (asked.dir or ROOT / "runs" / table.name).absolute()
        if not asked.recorded:
            table.data(directory)
            compare(table.file, directory, asked.seeds)
        record(table, directory)
    page.write()


if __name__ == "__main__":
    main()
