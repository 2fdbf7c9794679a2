"""Times functions on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from .scale import filled

ENOUGH = 0.4
"""Seconds after which a piece is not timed again."""


class Clock:
    """Times functions on a device within a budget of seconds."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.left = device, budget
        self._flops: dict[torch.dtype, float] = {}

    def flops(self, dtype: torch.dtype) -> float:
        """About how many floating-point operations a second matrix products make."""
        if dtype not in self._flops:
            size = 768
            matrix = filled(self.device)(torch.empty(size, size, dtype=dtype, device="meta"))
            self._flops[dtype] = 2 * size**3 / self.time(lambda: matrix @ matrix, 0.03)
        return self._flops[dtype]

    def time(self, call: Callable[[], object], limit: float) -> float:
        """Median seconds of a call, after one that warms up; a call that takes longer than `limit` is made once."""
        began = time.perf_counter()
        taken = [self._once(call)]
        if taken[0] < limit:
            taken = [self._once(call)]
            while time.perf_counter() - began < min(limit, ENOUGH) and len(taken) < 7:
                taken.append(self._once(call))
        self.left -= time.perf_counter() - began
        return statistics.median(taken)

    def _once(self, call: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
