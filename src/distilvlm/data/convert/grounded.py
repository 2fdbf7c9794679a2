"""Conversations that hold boxes already, as LLaVA's instruction data has them: each box is checked.

Boxes stand in questions ("describe this region: [0.12, 0.30, 0.45, 0.87]") and answers. Nothing in the text is changed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilvlm.data.boxes import Shares, parsed, unpadded
from distilvlm.data.convert import conversations
from distilvlm.data.convert.boxes import clipped
from distilvlm.data.convert.items import Fault, Item, Reading
from distilvlm.data.geometry import PictureError, upright_size

_LIST = re.compile(r"\[[\s\d.,+-]*\d[\s\d.,+-]*,[\s\d.,+-]*\]")
"""A list of numbers in brackets."""


def read(
    source: Path,
    images: Path | None = None,
    *,
    image_field: str | None = None,
    conversation_field: str | None = None,
) -> Reading:
    """Rows of LLaVA's JSON or JSONL whose turns hold boxes of the padded square; others are left out, and counted.

    Whatever is a list of numbers in brackets must be a box of four shares from 0 to 1, neither empty nor inverted, and
    inside of the picture (but for rounding): boxes in pixels, or of a picture that was not padded, are found so.
    `meta.boxes` of an answer that is nothing but boxes holds them in pixels, with `meta.size`; of several answers, each
    has its own under `meta.turns`. `task` is "grounding" where all answers are, else "mixed" (see `where`).

    Args:
        source: the file.
        images: directory of the pictures; default: the file's own.
        image_field, conversation_field: default: usual names.

    Raises:
        DataError: the file can't be read, or a column is not there.
    """
    talks = conversations.read(source, images, image_field=image_field, conversation_field=conversation_field)
    left_out: Counter[str] = Counter()

    def items() -> Iterator[Item | Fault]:
        for item in talks.items:
            if isinstance(item, Fault):
                yield item
            elif any(_LIST.search(turn.text) for turn in item.turns):
                yield _checked(item, talks.images)
            else:
                left_out["conversations without a box"] += 1

    return Reading(talks.images, items(), left_out)


def _checked(item: Item, root: Path) -> Item | Fault:
    if len(item.images) != 1:
        return item.fault(item.image_field, f"{len(item.images)} pictures: which one a box is of can't be told")
    try:
        size = upright_size(str(root / item.images[0]))
    except PictureError as error:
        return item.fault(item.image_field, f"{error}; put a whole picture there")
    metas: list[dict[str, Any]] = []
    for number, turn in enumerate(item.turns):
        for text in _LIST.findall(turn.text):
            if (reason := _problem(text, size)) is not None:
                return item.fault(f"conversations[{number}]", f"{text} {reason}")
        if turn.speaker == "gpt":
            boxes = parsed(turn.text)
            pixels = [_pixels(box, size) for box in boxes or ()]
            metas.append({"task": "grounding", "boxes": pixels, "size": list(size)} if boxes else {})
    task = "grounding" if all(metas) else "mixed"
    meta = {**item.meta, **(metas[0] if len(metas) == 1 else {"turns": metas})}
    return replace(item, fields={**item.fields, "task": task}, meta=meta)


def _problem(text: str, size: tuple[int, int]) -> str | None:
    """Why a list of numbers is no box of the picture, and what to do."""
    boxes = parsed(text)
    if boxes is None:
        return (
            "is no box: four numbers from 0 to 1 of the padded square are expected, [x1, y1, x2, y2]; divide pixels by "
            "the longer side, or leave the row out"
        )
    left, top, right, bottom = unpadded(boxes[0], *size)
    if left >= right or top >= bottom:
        return "is empty or inverted: left must be less than right, top less than bottom; mend or leave out"
    decimals = min(len(number.partition(".")[2].rstrip(" ]")) for number in text.split(","))
    rounding = max(size) * 10.0**-decimals  # a box that would have vanished was rounded outwards
    if min(left, top) < -rounding or right > size[0] + rounding or bottom > size[1] + rounding:
        return (
            f"reaches into the padding of the picture of {size[0]} x {size[1]} pixels: boxes are of the picture padded "
            "to a square, in its middle; are these of the picture alone?"
        )
    return None


def _pixels(box: Shares, size: tuple[int, int]) -> list[float]:
    return [round(number, 2) for number in clipped(unpadded(box, *size), size)]
