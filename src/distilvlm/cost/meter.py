"""What a stage of a run really took: peak memory of this process, seconds per update, bytes on disk."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
"""Writing 5 sets the kernel's record of the highest resident set (VmHWM) back to what is resident now."""


@dataclass(frozen=True)
class Measured:
    """Of a stage; None where nothing was measured (a stage of one update, an unknown system)."""

    peak_memory_bytes: int | None
    seconds_per_update: float | None  # median without the first, which warms up
    disk_bytes: int | None


class Meter:
    """Measures from `start` to `stop`, or inside a `with` block.

    On a CUDA device, memory is what torch allocated there at most; else the highest resident set of this process. Where
    the kernel keeps no such record, a thread looks every few milliseconds.

    Args:
        device: where the stage runs.
        directory: the run's, whose growth is measured.
    """

    def __init__(self, device: torch.device | str = "cpu", directory: Path | None = None) -> None:
        self._device, self._directory = torch.device(device), directory
        self._seconds: list[float] = []
        self._sampler: _Sampler | None = None
        self._peak: int | None = None
        self._before = 0

    def __enter__(self) -> Meter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin, forgetting what was measured before."""
        self._seconds, self._peak = [], None
        self._before = 0 if self._directory is None else bytes_under(self._directory)
        give_back()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif not _reset_record():
            self._sampler = _Sampler()

    def update(self, seconds: float) -> None:
        """Tell of an optimiser update."""
        self._seconds.append(seconds)

    def stop(self) -> None:
        """Memory and time are not measured any further; the disk still is, until `measured` is asked."""
        if self._peak is not None:
            return
        if self._device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self._device)
        elif self._sampler is not None:
            self._peak = self._sampler.stop()
            self._sampler = None
        else:
            self._peak = _status("VmHWM")

    def measured(self) -> Measured:
        self.stop()
        later = self._seconds[1:]
        disk = None if self._directory is None else bytes_under(self._directory) - self._before
        return Measured(self._peak or None, statistics.median(later) if later else None, disk)


def give_back() -> None:
    """Free what only refers to itself, and hand freed memory back to the system, where the C library can (glibc).

    Its allocator keeps what was freed: a loaded model that was cut, or the stage before, would count for the next one.
    So would a model with adaptors that nobody holds any more, until Python looks for such cycles.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Resident set of this process now; 0 where the system does not tell."""
    return _status("VmRSS")


def available_bytes() -> int | None:
    """Memory that this machine could give to new programs; None where the system does not tell."""
    return _meminfo("MemAvailable")


def machine_bytes(device: torch.device) -> int | None:
    """Memory of the device: the card's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _meminfo("MemTotal")


def bytes_under(directory: Path) -> int:
    """Sizes of all files below a directory."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            total += (Path(folder) / name).lstat().st_size
    return total


def _reset_record() -> bool:
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return _status("VmHWM") > 0


def _status(field: str) -> int:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _meminfo(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


class _Sampler:
    """Highest resident set seen by a thread."""

    def __init__(self, pause: float = 0.005) -> None:
        self._highest = resident_bytes()
        self._stop = threading.Event()
        self._pause = pause
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self._highest, resident_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(self._pause):
            self._highest = max(self._highest, resident_bytes())
