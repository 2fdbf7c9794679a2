"""Whether a model finds what it is asked for: accuracy at an overlap (IoU) of one half, as RefCOCO is scored.

The true boxes stand in a question's `meta`: `boxes` in pixels of the upright picture and its `size`, as the converters
write them (`distilvlm data convert refcoco`, `... grounded`, and `... yolo` or `voc` with `--task grounding`).

* IAA's own script calls an answer right if **any** of its boxes is good enough, which pays for naming many: that is
  the second figure here. The first looks at the first box only.
* Answers are read strictly (`data.boxes.parsed`); its script evaluates them as Python. What can't be read is wrong, and
  counted.
* An inverted box (left of right, top of bottom) agrees with nothing. It is not put in order, but counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distilvlm.data.boxes import Box, parsed, unpadded
from distilvlm.data.problems import DataError
from distilvlm.evaluate.grounding.overlap import iou
from distilvlm.evaluate.measures import Figure, Measure
from distilvlm.evaluate.questions import Question

ENOUGH = 0.5
"""Overlap from which a box counts as right."""


def true_boxes(question: Question) -> tuple[list[Box], tuple[int, int]]:
    """The true boxes in pixels and the picture's width and height, from the question's `meta`.

    Raises:
        DataError: they are not there, or are no boxes; names file and row.
    """
    boxes, size = question.meta.get("boxes"), question.meta.get("size")
    if not (_lists_of(4, boxes) and _lists_of(2, [size])):
        key = question.record.key
        raise DataError(
            f"{key.file}, row {key.row}: no true box to compare with: a row needs meta.boxes = [[left, top, right, "
            "bottom], ...] in pixels and meta.size = [width, height] (`distilvlm data convert refcoco`, `grounded`, or "
            "`yolo` and `voc` with --task grounding write them)"
        )
    assert isinstance(boxes, list) and isinstance(size, list)
    return [(left, top, right, bottom) for left, top, right, bottom in boxes], (size[0], size[1])


def _lists_of(length: int, value: Any) -> bool:
    """Whether a value is a list of at least one list of so many numbers."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, list) and len(one) == length for one in value)
        and all(isinstance(number, (int, float)) for one in value for number in one)
    )


def judge(question: Question, prediction: str) -> Mapping[str, Any]:
    """The answer's boxes in pixels, and the overlap of each with the true box that it agrees with most.

    Raises DataError for a question without true boxes.
    """
    truths, size = true_boxes(question)
    found = parsed(prediction)
    boxes = [unpadded(box, *size) for box in found or ()]
    overlaps = [max(iou(box, truth) for truth in truths) for box in boxes]
    inverted = sum(left > right or top > bottom for left, top, right, bottom in boxes)
    right = bool(overlaps) and overlaps[0] >= ENOUGH
    if found is None:
        verdict = "not a box"
    else:
        verdict = f"{'right' if right else 'wrong'} (IoU {overlaps[0]:.2f})" + (", inverted" if inverted else "")
    return {
        "true": [list(box) for box in truths],
        "size": list(size),
        "boxes": [[round(number, 2) for number in box] for box in boxes],
        "overlaps": overlaps,
        "inverted": inverted,
        "readable": found is not None,
        "right": right,
        "verdict": verdict,
    }


FIGURES = (
    Figure(
        "acc",
        "acc@0.5",
        lambda one: (one.details["right"], 1),
        about="Answers whose first box overlaps the true one by half (IoU of at least 0.5).",
    ),
    Figure(
        "acc_any",
        "acc@0.5, any box",
        lambda one: (max(one.details["overlaps"], default=0) >= ENOUGH, 1),
        about="The same of any box of the answer, as the method's own script has it: many boxes help.",
    ),
    Figure(
        "overlap",
        "mean IoU",
        lambda one: ((one.details["overlaps"] or [0])[0], 1),
        about="Overlap of the first box with the true one; 0 where there is none.",
    ),
    Figure(
        "unreadable",
        "not a box",
        lambda one: (not one.details["readable"], 1),
        better="lower",
        about="Answers that are anything but boxes as they are to be written; they are wrong.",
    ),
    Figure(
        "inverted",
        "inverted",
        lambda one: (one.details["inverted"], len(one.details["boxes"])),
        better="lower",
        about="Of all boxes in the answers, those whose left is right of their right, or whose top is below.",
        headline=False,
    ),
    Figure(
        "boxes",
        "boxes per answer",
        lambda one: (len(one.details["boxes"]), one.details["readable"]),
        better="neither",
        percent=False,
        about="Of answers that are boxes.",
        headline=False,
    ),
)

GROUNDING = Measure("grounding", FIGURES, judge)
