"""What came out of many inputs: nothing, our own errors, or something that is a defect."""

from __future__ import annotations

import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import distilvlm
from distilvlm.errors import is_for_the_user

HOME = Path(distilvlm.__file__).parent
SECONDS = 10
"""For one input, whatever it is."""


class TooSlowError(BaseException):
    """Not an Exception: what catches all of these must not catch the clock."""


@dataclass
class Tally:
    """Counts by error class ("fine" where there was none), and the first input of each defect."""

    counts: Counter[str] = field(default_factory=Counter)
    defects: dict[str, tuple[Any, str]] = field(default_factory=dict)
    slowest: float = 0.0

    def run(self, target: Callable[[Any], object], given: Any) -> None:
        start = time.perf_counter()
        try:
            with _clock():
                target(given)
            told = "fine"
        except (Exception, TooSlowError) as error:
            told = type(error).__name__
            if not (is_for_the_user(error) and str(error).strip()):
                frames = traceback.extract_tb(error.__traceback__)
                own = [frame for frame in frames if Path(frame.filename).is_relative_to(HOME)]
                place = f"{Path(own[-1].filename).relative_to(HOME)}:{own[-1].lineno}" if own else "outside"
                told = f"defect: {told} at {place}"
                self.defects.setdefault(told, (given, f"{str(error)[:300]!r} from {frames[-1].filename}"))
        self.counts[told] += 1
        self.slowest = max(self.slowest, time.perf_counter() - start)


@contextmanager
def memory(more: int) -> Iterator[None]:
    """No more than `more` bytes of address space beside what this process has already."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _clock() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooSlowError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again: some places swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak() -> float:
    """Highest resident set of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)
