"""Axes of a chart: from values to places in the picture, good ticks, and numbers as a reader expects them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LOG_FROM = 20
"""Largest by smallest value from which an axis is logarithmic: below, a linear axis still shows both ends."""


@dataclass(frozen=True)
class Axis:
    """Values `low` to `high` on the places `start` to `end` (SVG units)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value stands; what lies outside stands at the border."""
        share = (self._scaled(value) - self._scaled(self.low)) / (self._scaled(self.high) - self._scaled(self.low))
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, about: int = 6) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, about)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def fitted(values: Iterable[float], start: float, end: float) -> Axis:
    """An axis for `values`: logarithmic if they are positive and span decades, else linear, from 0 if that is near."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if low > 0 and high / low >= LOG_FROM:
        return Axis(low / 1.15, high * 1.15, start, end, log=True)
    if 0 < low < 0.4 * high:
        low = 0.0
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low if low == 0 else low - room, high + room, start, end)


def linear_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about so many."""
    step = _nice((high - low) / max(1, about))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [_clean(number * step) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with 2 and 5 between them where there are few, every second where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    leading = (1.0, 2.0, 5.0) if math.log10(high / low) < 2.2 else (1.0,)
    every = 2 if last - first > 7 else 1
    values = [lead * 10.0**power for power in range(first, last + 1, every) for lead in leading]
    return [_clean(value) for value in values if low <= value <= high]


def labels(ticks: Sequence[float]) -> list[str]:
    """Labels of one axis, all written alike: 1e-3 and 5e-4, or 0.001 and 0.0005, never mixed."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    return [number(tick, powers_below=0.1 if largest < 0.01 else 1e-3) for tick in ticks]


def number(value: float, powers_below: float = 1e-3) -> str:
    """A tick's label: 0.02, 5, 12k, 2e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < powers_below:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.6g}"


def reading(value: float) -> str:
    """A value in a sentence or a legend: three digits that count."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return number(float(f"{value:.2e}"))
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}"


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(lead * power for lead in (1, 2, 5, 10) if lead * power >= step * 0.75)


def _clean(value: float) -> float:
    return float(f"{value:.10g}")
