"""Boxes as text: how a model is asked for one, how it is written and read, and where it lies in the picture.

A box is written `[x1, y1, x2, y2]`: left, top, right, bottom from 0 to 1 of the picture **padded to a square** (of its
longer side, the picture in the middle), with two decimals: LLaVA-1.5's convention, which IAA's grounding data and
metric follow. `pictures.geometry: pad` shows the model that square. Boxes are joined by "; ", from left to right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from distilvlm.data.geometry import padding

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the upright picture; the right and lower edges lie behind the last pixel."""

Shares = tuple[float, float, float, float]
"""The same from 0 to 1 of the padded square."""

REFERRING = "Please provide the bounding box coordinate of the region this sentence describes: {expression}"
"""LLaVA-1.5's question for referring expressions, which IAA asks, too."""

_NUMBER = r"\s*([01]?\.[0-9]+|[01])\s*"
_BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")


def padded(box: Sequence[float], width: int, height: int) -> Shares:
    """A box in pixels of a picture of `width` x `height` → from 0 to 1 of its padded square."""
    side, across, down = padding(width, height)
    left, top, right, bottom = box
    return (left + across) / side, (top + down) / side, (right + across) / side, (bottom + down) / side


def unpadded(box: Sequence[float], width: int, height: int) -> Box:
    """The inverse of `padded`: pixels of the picture. A box that reaches into the padding then sticks out of it."""
    side, across, down = padding(width, height)
    left, top, right, bottom = box
    return left * side - across, top * side - down, right * side - across, bottom * side - down


def written(box: Sequence[float], size: tuple[int, int], decimals: int = 2) -> str:
    """A box in pixels as text; one that would vanish by rounding is rounded outwards."""
    shares = padded(box, *size)
    left, right = _rounded(shares[0], shares[2], decimals)
    top, bottom = _rounded(shares[1], shares[3], decimals)
    return "[" + ", ".join(f"{value:.{decimals}f}" for value in (left, top, right, bottom)) + "]"


def parsed(text: str) -> tuple[Shares, ...] | None:
    """The boxes that a text consists of, joined by ";"; None where it is anything else.

    Strict: four plain decimals from 0 to 1 in brackets, with any space between. Nothing is searched for in a sentence,
    put in order or cut to the square, and nothing is evaluated.
    """
    found = [_BOX.fullmatch(part.strip()) for part in text.split(";")]
    boxes = [_shares(match) for match in found if match is not None]
    good = len(boxes) == len(found) and all(max(box) <= 1 for box in boxes)
    return tuple(boxes) if good else None


def _shares(match: re.Match[str]) -> Shares:
    left, top, right, bottom = map(float, match.groups())
    return left, top, right, bottom


def _rounded(low: float, high: float, decimals: int) -> tuple[float, float]:
    unit = 10**decimals
    near = round(low * unit), round(high * unit)
    if near[0] == near[1]:
        near = math.floor(low * unit), math.ceil(high * unit)
    return near[0] / unit, near[1] / unit
