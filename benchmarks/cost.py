"""Estimate against measurement: runs recipes for a few updates and prints both, stage by stage.

    python benchmarks/cost.py RECIPE [RECIPE ...] [--updates 8] [--threads N] [--dir DIR] [--csv FILE] [--set F=V ...]

Each recipe is estimated and run in a process of its own, as `distilvlm run` would; its models, data and feature store
must be here. The machine must be quiet: seconds are wall-clock, unless --cpu-time asks for the process's own (fair on a
busy machine with one thread). Every run is made in a new directory under --dir and removed afterwards.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

QUANTITIES = ("peak_memory_bytes", "seconds_per_update", "disk_bytes")


def one(recipe: Path, overrides: list[str], updates: int, place: Path, cpu_time: bool) -> list[dict[str, Any]]:
    """Estimate one recipe as `plan` does, then run it; both in this process."""
    if cpu_time:
        time.perf_counter = time.process_time
    import torch
    from transformers.utils import logging as theirs

    import distilvlm
    from distilvlm import cost
    from distilvlm.models import build
    from distilvlm.recipe import load_recipe
    from distilvlm.runs.stage import StageRun

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    names = [stage.name for stage in load_recipe(recipe, overrides).stages]
    overrides = [
        *overrides,
        *(
            word
            for name in names
            for word in (f"stages.{name}.optim.updates={updates}", f"stages.{name}.optim.epochs=null")
        ),
    ]
    loaded = load_recipe(recipe, overrides)
    student = build(loaded.student, loaded.seed, meta=True)
    teacher = None if loaded.teacher is None else build(loaded.teacher, loaded.seed, meta=True)
    began = time.perf_counter()
    costs = cost.estimate(loaded, student, teacher)
    taken = time.perf_counter() - began

    meters: dict[str, cost.Meter] = {}
    execute = StageRun.execute

    def metered(self: StageRun, guide: Any) -> None:
        meter = meters[self.stage.name] = cost.Meter(self.accelerator.device, place)
        meter.start()
        execute(self, guide)
        meter.stop()
        for line in self.place.events.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "update" and event["stage"] == self.stage.name:
                meter.update(event["seconds"])
        if self.stage.name != names[-1]:
            frozen[self.stage.name] = meter.measured()

    frozen: dict[str, cost.Measured] = {}
    StageRun.execute = metered  # pyright: ignore
    distilvlm.run(loaded, directory=place)
    rows: list[dict[str, Any]] = []
    for found in costs:
        measured = frozen.get(found.stage) or meters[found.stage].measured()
        row: dict[str, Any] = {"recipe": loaded.name, "stage": found.stage, "threads": torch.get_num_threads()}
        for name in QUANTITIES:
            row |= {f"{name} estimated": getattr(found, name), f"{name} measured": asdict(measured)[name]}
        rows.append(row | {"estimate took": round(taken, 1)})
    return rows


def machine() -> str:
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    return f"{processor}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--dir", type=Path, default=None, help="where the runs are made; default: a temporary directory"
    )
    parser.add_argument("--csv", type=Path, default=None)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        rows = one(options.recipes[0], options.set, options.updates, options.one, options.cpu_time)
        print("RESULT " + json.dumps(rows))
        return

    print(f"{datetime.date.today()}, {machine()}, {options.threads} threads, {options.updates} updates a stage")
    print("estimated/measured      memory             seconds per update      disk")
    collected: list[dict[str, Any]] = []
    for recipe in options.recipes:
        place = Path(tempfile.mkdtemp(dir=options.dir)) / "run"
        words = [sys.executable, __file__, str(recipe), "--one", str(place), "--updates", str(options.updates)]
        words += ["--cpu-time"] * options.cpu_time + ["--set", *options.set]
        threads = {"OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
        shutil.rmtree(place.parent, ignore_errors=True)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not found:
            sys.exit(f"{recipe} failed")
        for row in json.loads(found[0].removeprefix("RESULT ")):
            collected.append({"date": str(datetime.date.today()), "machine": machine(), **row})
            print(f"{row['recipe']} {row['stage']}: " + ", ".join(pair(row, name) for name in QUANTITIES), flush=True)
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(collected[0]))
            writer.writeheader()
            writer.writerows(collected)


def pair(row: dict[str, Any], name: str) -> str:
    estimated, measured = row[f"{name} estimated"], row[f"{name} measured"]
    if not estimated or not measured:
        return f"{name} {estimated} / {measured}"
    return f"{estimated:.4g} / {measured:.4g} ({estimated / measured - 1:+.0%})"


if __name__ == "__main__":
    main()
