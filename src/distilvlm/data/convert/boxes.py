"""Boxes as conversations: where things are, which things there are, how many.

A box is written `[x1, y1, x2, y2]`: left, top, right, bottom from 0 to 1 of the picture **padded to a square** (of its
longer side, the picture in the middle), with two decimals: LLaVA-1.5's convention, which IAA's grounding data and
metric follow. `pictures.geometry: pad` shows the model that square. Boxes are joined by "; ", from left to right.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from distilvlm.data.convert.items import Fault, Item, asked, filled
from distilvlm.data.problems import DataError

Task = Literal["detect", "list", "count"]

QUESTIONS: dict[str, str] = {
    "detect": "Locate every {thing}.",
    "list": "Which things are in this picture?",
    "count": "Count every {thing}.",
}
ABSENT: dict[str, str] = {"detect": "none", "list": "none", "count": "0"}
"""What is answered about things that are not there."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the upright picture; the right and lower edges lie behind the last pixel."""

ROUNDING = 0.5
"""Pixels that a box may stick out of its picture, which is what rounding does: it is cut off."""


@dataclass(frozen=True)
class Boxed:
    """A picture and the things in it."""

    file: str  # of the annotation, for messages
    image: str  # relative to the picture root
    size: tuple[int, int]  # width, height of the upright picture
    things: tuple[tuple[str, Box], ...]


@dataclass(frozen=True)
class Asking:
    """What is asked about boxed pictures.

    Args:
        task: "detect" (one question per thing, answered by its boxes), "list" (one per picture) or "count".
        question: with {thing}, except for "list"; default: QUESTIONS.
        absent: ask about so many things, too, that are not in the picture (a choice by its name). Pictures without
            objects give rows only then.
        decimals: of a box.

    Raises:
        DataError: no such task, or numbers out of range.
    """

    task: str = "detect"
    question: str | None = None
    absent: int = 0
    decimals: int = 2

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise DataError(f"task: {self.task!r} is none of {', '.join(get_args(Task))}")
        if self.absent < 0 or not 1 <= self.decimals <= 6:
            raise DataError("absent must not be negative, decimals from 1 to 6")

    def items(self, pictures: Sequence[Boxed], names: Sequence[str], left_out: Counter[str]) -> Iterator[Item]:
        """Rows for every picture, of the things `names`; pictures that give none are counted in `left_out`."""
        for picture in pictures:
            if not picture.things and not self.absent:
                left_out["pictures without objects"] += 1
                continue
            if self.task == "list":
                yield self._list(picture)
                continue
            there = list(dict.fromkeys(name for name, _ in picture.things))
            for name in [*there, *self._absent(picture, [name for name in names if name not in there])]:
                yield self._about(picture, name)

    def _list(self, picture: Boxed) -> Item:
        counted = Counter(name for name, _ in picture.things)
        meta = {"task": "list", "things": dict(sorted(counted.items()))}
        return self._item(picture, picture.image, "", ", ".join(sorted(counted)), meta)

    def _about(self, picture: Boxed, name: str) -> Item:
        boxes = sorted(box for other, box in picture.things if other == name)
        meta = {"task": self.task, "thing": name, "boxes": _pixels(boxes), "size": list(picture.size)}
        if self.task == "count":
            answer = str(len(boxes))
        else:
            answer = "; ".join(written(box, picture.size, self.decimals) for box in boxes)
        return self._item(picture, f"{picture.image}:{name}", name, answer, meta)

    def _item(self, picture: Boxed, id: str, thing: str, answer: str, meta: dict[str, object]) -> Item:
        question = QUESTIONS[self.task] if self.question is None else self.question
        known = {"thing": thing} if thing else {}
        turns = asked(filled(question, known, "question"), answer or ABSENT[self.task])
        return Item(picture.file, None, id, (picture.image,), turns, meta, meta)

    def _absent(self, picture: Boxed, names: Sequence[str]) -> list[str]:
        def drawn(name: str) -> bytes:
            return hashlib.sha256(f"{picture.image}:{name}".encode()).digest()

        return sorted(names, key=drawn)[: self.absent]


def _pixels(boxes: Sequence[Box]) -> list[list[float]]:
    return [[round(value, 2) for value in box] for box in boxes]


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


def written(box: Box, size: tuple[int, int], decimals: int = 2) -> str:
    """A box as text; one that would vanish by rounding is rounded outwards."""
    width, height = size
    side = max(width, height)
    across, down = (side - width) // 2, (side - height) // 2  # as `geometry.canvas` pads
    left, right = _rounded((box[0] + across) / side, (box[2] + across) / side, decimals)
    top, bottom = _rounded((box[1] + down) / side, (box[3] + down) / side, decimals)
    return "[" + ", ".join(f"{value:.{decimals}f}" for value in (left, top, right, bottom)) + "]"


def _rounded(low: float, high: float, decimals: int) -> tuple[float, float]:
    unit = 10**decimals
    near = round(low * unit), round(high * unit)
    if near[0] == near[1]:
        near = math.floor(low * unit), math.ceil(high * unit)
    return near[0] / unit, near[1] / unit


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
