"""How well two boxes agree."""

from __future__ import annotations

from collections.abc import Sequence


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Area of what two boxes (left, top, right, bottom) share / area that they cover together.

    Plain areas, no pixel added. Boxes that only touch share nothing, and an inverted or empty one shares nothing with
    any: 0, as the method's evaluation has it.
    """
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    if across <= 0 or down <= 0:
        return 0.0
    shared = across * down
    return shared / (_area(a) + _area(b) - shared)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
