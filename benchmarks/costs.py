"""Estimate against measurement, of every run below the directories given, as a Markdown table.

    python benchmarks/costs.py runs/quickstart runs/photos

Every run writes what it was expected to take, and what it took, into its `cost.json`. The machine must have been quiet
for the seconds to mean anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from distilvlm.cost import as_bytes, as_seconds

SHOWN = {"peak_memory_bytes": as_bytes, "seconds_per_update": as_seconds, "disk_bytes": as_bytes}


def main() -> None:
    print("| run | stage | peak memory | per update | disk |\n|---|---|---:|---:|---:|")
    outside = total = 0
    for file in sorted(path for root in sys.argv[1:] for path in Path(root).rglob("cost.json")):
        for stage in json.loads(file.read_text())["stages"]:
            cells: list[str] = []
            for name, show in SHOWN.items():
                expected, measured = stage["estimate"][name], (stage["measured"] or {}).get(name)
                if expected is None or not measured:
                    cells.append("–")
                    continue
                error = expected / measured - 1
                total, outside = total + 1, outside + (abs(error) > 0.2)
                cells.append(f"{show(expected)} / {show(measured)} ({error:+.0%})")
            print(f"| {'/'.join(file.parts[-3:-1])} | {stage['stage']} | {' | '.join(cells)} |")
    print(f"\nestimated / measured (error); {outside} of {total} are off by more than 20%")


if __name__ == "__main__":
    main()
