"""What benchmarks of several contenders in one process share: seconds, extra memory, rounds in turn, rows of a CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState

from distilvlm.cost.meter import give_back

Step = Callable[[], object]


class Peak:
    """Highest memory of this process while the block runs, above where it started (Linux): of its resident set `mib`,
    and of what in it is no file's (whose pages the system may take back) `anonymous_mib`."""

    def __enter__(self) -> Peak:
        gc.collect()
        self._start = self._highest = self._now()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        self.mib, self.anonymous_mib = ((self._highest - self._start) / 2**20).tolist()

    def _watch(self) -> None:
        while self._running:
            self._highest = np.maximum(self._highest, self._now())
            time.sleep(0.002)

    @staticmethod
    def _now() -> np.ndarray:
        """[2] bytes: resident, and of these anonymous."""
        _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return np.array([resident, resident - of_files]) * os.sysconf("SC_PAGE_SIZE")


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return f"{cpu}, {os.cpu_count()} cores"


def arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Options that all of them have."""
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds, after one that measures memory")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--remark", default="", help="stands behind the machine's name, e.g. what else it was doing")
    parser.add_argument("--append", action="store_true", help="add rows to the file instead of replacing it")
    parser.add_argument("--output", type=Path, help=f"default: results/{output}, of a GPU with _gpu behind its name")
    parser.set_defaults(results=Path(__file__).parent / "results" / output)


def prepare(options: argparse.Namespace) -> dict[str, object]:
    """Set the threads; returns what every row says of date, machine and versions."""
    torch.set_num_threads(options.threads)
    if options.output is None:
        name = f"{options.results.stem}_gpu.csv" if options.device == "cuda" else options.results.name
        options.output = options.results.with_name(name)
    # Where memory runs out, this process goes and not another one's training.
    if (adjust := Path("/proc/self/oom_score_adj")).exists():
        adjust.write_text("1000")
    where = torch.cuda.get_device_name() if options.device == "cuda" else machine()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": where + (f"; {options.remark}" if options.remark else ""),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "threads": options.threads,
        "clock": "wall" if _wall(options) else "cpu",
    }


def forget_precision() -> None:
    """accelerate else holds to the first dtype of the process."""
    AcceleratorState._reset_state()


def measured(
    contenders: Mapping[str, Step], options: argparse.Namespace, forget: Step = lambda: None
) -> dict[str, tuple[float, float]]:
    """Median seconds and extra MiB of each contender.

    Memory is the peak of the first pass, which also warms up, above what was held before it. The timed passes are made
    in turn, so that a busy machine disturbs all alike. One thread on a CPU is timed by the processor's clock, which
    does not count what others do meanwhile.

    Args:
        forget: called before every pass, e.g. to drop gradients.
    """
    memory: dict[str, float] = {}
    for name, step in contenders.items():
        forget()
        memory[name] = _extra_mib(step, options.device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.repeats):
        for name, step in contenders.items():
            forget()
            seconds[name].append(_seconds(step, options))
    return {name: (statistics.median(seconds[name]), memory[name]) for name in contenders}


def write(options: argparse.Namespace, fields: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    goes_on = options.append and options.output.exists()
    with options.output.open("a" if goes_on else "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if not goes_on:
            writer.writeheader()
        writer.writerows(rows)


def _wall(options: argparse.Namespace) -> bool:
    return options.device == "cuda" or options.threads > 1


def _seconds(step: Step, options: argparse.Namespace) -> float:
    now = time.perf_counter if _wall(options) else time.process_time
    _wait(options.device)
    start = now()
    step()
    _wait(options.device)
    return now() - start


def _extra_mib(step: Step, device: str) -> float:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    give_back()
    with Peak() as peak:
        step()
    return peak.mib


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
