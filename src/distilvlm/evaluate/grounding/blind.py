"""Boxes that never look at the picture. Things are often large and in the middle: guessing is right more often than one
would think, and a model must beat it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from distilvlm.data.boxes import Shares, parsed, written
from distilvlm.data.problems import DataError
from distilvlm.evaluate.grounding.measure import ENOUGH, true_boxes
from distilvlm.evaluate.grounding.overlap import iou
from distilvlm.evaluate.questions import Question

CANDIDATES, VOTERS = 100, 2000
"""Training boxes that are tried, and that they are tried on, at most: spread evenly over all."""


def blind_answers(
    questions: Sequence[Question], training: Sequence[tuple[str, str]] | None = None
) -> dict[str, list[str]]:
    """Baseline → its answers.

    "whole picture"; and from `training` (question, answer), "majority": the training box that most training boxes
    overlap enough to be right, and "question-only": the same of the training boxes for that very question, where there
    are any. (The most common answer, which this is for words, says nothing: hardly any box comes twice.)

    Raises:
        DataError: a question without true boxes, or a training file without a box.
    """
    whole: list[str] = []
    for question in questions:
        width, height = true_boxes(question)[1]
        whole.append(written((0, 0, width, height), (width, height)))
    found = {"whole picture": whole}
    if training is not None:
        given: defaultdict[str, list[str]] = defaultdict(list)
        for asked, answer in training:
            if parsed(answer) is not None:
                given[asked].append(answer)
        every = [answer for answers in given.values() for answer in answers]
        if not every:
            raise DataError("the training questions are not answered by boxes")
        usual = _usual(every)
        own = {asked: _usual(given[asked]) for asked in {question.text for question in questions} & {*given}}
        found["majority"] = [usual] * len(questions)
        found["question-only"] = [own.get(question.text, usual) for question in questions]
    return found


def _usual(answers: Sequence[str]) -> str:
    """The answer whose first box is right most often; of several, the one that comes first."""
    boxes = [_first(answer) for answer in _spread(answers, VOTERS)]
    votes = {
        answer: sum(iou(_first(answer), box) >= ENOUGH for box in boxes) for answer in _spread(answers, CANDIDATES)
    }
    return max(votes, key=votes.__getitem__)


def _first(answer: str) -> Shares:
    boxes = parsed(answer)
    assert boxes  # others were left out
    return boxes[0]


def _spread(answers: Sequence[str], most: int) -> list[str]:
    count = min(most, len(answers))
    return [answers[number * len(answers) // count] for number in range(count)]
