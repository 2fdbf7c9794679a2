"""Strange recipes, rows, pictures, boxes, adaptors and checkpoints: whether only our own errors come out.

    python benchmarks/fuzz.py                      # 10,000 inputs to each, into results/fuzz.csv
    python benchmarks/fuzz.py --only rows --inputs 500 --seed 3

Every target runs in a process of its own with bounded address space. Inputs are Hypothesis', a function of seed, number
and its version. A defect is any error that is not for the user (`distilvlm.errors`), or an input that takes more than
10 s; the first input of each is printed, and the exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measuring import machine, write

FIELDS = ["date", "machine", "python", "hypothesis", "seed", "target", "inputs", "outcome", "count"]
FIELDS += ["peak_mib", "slowest_s", "seconds"]


def fuzzed(name: str, inputs: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, tuple[Any, str]]]:
    """In a process of its own: rows of counts, and the defects."""
    import time

    from transformers.utils.logging import disable_progress_bar

    from tests.fuzz.running import fuzz
    from tests.fuzz.tally import peak

    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        before, start = peak(), time.perf_counter()
        tally = fuzz(name, inputs, Path(directory), seed)
        seconds = time.perf_counter() - start
    told = {
        "target": name,
        "inputs": sum(tally.counts.values()),
        "peak_mib": round(peak() - before),
        "slowest_s": f"{tally.slowest:.2f}",
        "seconds": round(seconds),
    }
    return [{**told, "outcome": what, "count": count} for what, count in tally.counts.most_common()], tally.defects


def main() -> None:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="to each target")
    parser.add_argument("--only", action="append", choices=list(TARGETS), help="a target, repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--append", action="store_true", help="add rows to the file instead of replacing it")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fuzz.csv")
    options = parser.parse_args()
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "python": sys.version.split()[0],
        "hypothesis": importlib.metadata.version("hypothesis"),
        "seed": options.seed,
    }
    found, defects = [], {}
    for name in options.only or TARGETS:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            rows, wrong = alone.apply(fuzzed, (name, options.inputs, options.seed))
        for row in rows:
            print(f"{name}: {row['count']} {row['outcome']}", flush=True)
        for what, (given, told) in wrong.items():
            print(f"{name}: {what}: {told}\n  of {str(given)[:400]}", flush=True)
        found += [{**about, **row} for row in rows]
        defects.update(wrong)
    write(options, FIELDS, found)
    sys.exit(1 if defects else 0)


if __name__ == "__main__":
    main()
