"""Boxed pictures: the things in one, and what is wrong with a box."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from distilvlm.data.boxes import Box
from distilvlm.data.convert.items import Fault

ROUNDING = 0.5
"""Pixels that a box may stick out of its picture, which is what rounding does: it is cut off."""


@dataclass(frozen=True)
class Boxed:
    """A picture and the things in it."""

    file: str  # of the annotation, for messages
    image: str  # relative to the picture root
    size: tuple[int, int]  # width, height of the upright picture
    things: tuple[tuple[str, Box], ...]

    @property
    def counts(self) -> dict[str, int]:
        """Thing -> how many there are, those that cover most first."""
        area: defaultdict[str, float] = defaultdict(float)
        for name, (left, top, right, bottom) in self.things:
            area[name] += (right - left) * (bottom - top)
        counted = Counter(name for name, _ in self.things)
        return {name: counted[name] for name in sorted(counted, key=lambda name: (-area[name], name))}


def problem(box: Box, size: tuple[int, int]) -> str | None:
    """Why a box can't be used, and what to do; None for a good one."""
    left, top, right, bottom = box
    width, height = size
    shown = "[" + ", ".join(f"{value:g}" for value in box) + "]"
    if not all(map(math.isfinite, box)):
        return f"{shown} is no box: write numbers"
    if left >= right or top >= bottom:
        return f"{shown} is empty or inverted: left must be less than right, top less than bottom; mend or remove it"
    if min(left, top) < -ROUNDING or right > width + ROUNDING or bottom > height + ROUNDING:
        return f"{shown} sticks out of the picture of {width} x {height} pixels: mend it, or cut it to the picture"
    return None


def clipped(box: Box, size: tuple[int, int]) -> Box:
    """Without what rounding lets stick out."""
    width, height = size
    left, top, right, bottom = box
    return max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)


def checked(
    file: str, image: str, size: tuple[int, int], things: Sequence[tuple[int, str, Box]]
) -> tuple[Boxed, list[Fault]]:
    """The picture with its things (row of the file, name, box), and a fault for every box that can't be used.

    A picture with a fault is not for use: with one thing missing it would teach wrong answers.
    """
    faults = [
        Fault(file, row, "box", f"{name} {reason}") for row, name, box in things if (reason := problem(box, size))
    ]
    good = () if faults else tuple((name, clipped(box, size)) for _, name, box in things)
    return Boxed(file, image, size, good), faults
