"""How far a student's features are from its teachers' on pictures that were not trained on, beside predicting the mean.

A trainable adapter on the teacher's side can bring the target to the student instead of the student to the target
(specification §3.5), so a small loss alone says little: where both become nearly constant, it is small and nothing is
known of any picture. The measure's unit is therefore the error of always predicting the target's mean over training
pictures, each place of the grid its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distilvlm.data import Turn
from distilvlm.data.records import PICTURE
from distilvlm.evaluate.encoders.measures import FEATURE_ERROR, written
from distilvlm.evaluate.measures import Measure
from distilvlm.evaluate.questions import Asked, Question
from distilvlm.evaluate.report import Evaluation, score

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""Teacher → what the student predicts and what is right, [pictures, N, C] each."""

Compared = Callable[[Sequence[str]], Iterator[Pairs]]
"""Picture files → their pairs, in batches, in order."""


def feature_errors(
    compared: Compared, training: Sequence[str], questions: Sequence[Question], measure: Measure = FEATURE_ERROR
) -> Evaluation:
    """The student's error on each question of `feature_questions`.

    Args:
        compared: where the loss compares them, or a `Readout`, whose measure is FEATURE_READOUT.
        training: pictures whose features have the mean that is the unit.

    Raises:
        ValueError: no pictures, a teacher that the pairs lack, or one whose features are the same on all pictures.
    """
    means = _means(compared(training))
    if missing := sorted({*_teachers(questions)} - {*means}):
        raise ValueError(f"the student is not compared with {missing}: its stages have {sorted(means)}")
    shown = list(dict.fromkeys(question.record.images[0] for question in questions))
    errors: dict[str, list[Tensor]] = {name: [] for name in means}
    of_mean: dict[str, list[Tensor]] = {name: [] for name in means}
    for pairs in compared(shown):
        for name, (prediction, target) in pairs.items():
            target = target.double()
            errors[name].append((prediction.double() - target).square().mean((1, 2)).cpu())
            of_mean[name].append((means[name] - target).square().mean((1, 2)).cpu())
    told: dict[tuple[str, str], str] = {}
    for name in _teachers(questions):
        mine, others = torch.cat(errors[name]), torch.cat(of_mean[name])
        unit = others.mean()
        if not unit:
            raise ValueError(f"the features of '{name}' are the same on all pictures: nothing is there to predict")
        for path, error, other in zip(shown, mine / unit, others / unit, strict=True):
            told[path, name] = written(float(error), float(other))
    predictions = [told[question.record.images[0], question.meta["teacher"]] for question in questions]
    return score(questions, predictions, measure=measure, by_picture=True)


def feature_questions(asked: Asked, teachers: Sequence[str]) -> tuple[Question, ...]:
    """One question per teacher and picture of `asked`, whose answers don't matter here."""
    found: list[Question] = []
    for teacher in teachers:
        for one in asked.questions:
            turns = (Turn("user", f"{PICTURE}\nhow far from the features of {teacher}?"), Turn("assistant", "0"))
            key = replace(one.record.key, row=len(found))
            record = replace(one.record, key=key, id=f"{one.record.id} {teacher}", turns=turns)
            found.append(Question(record, 0, {"teacher": teacher}))
    return tuple(found)


def predicting_the_mean(questions: Sequence[Question], measure: Measure = FEATURE_ERROR) -> Evaluation:
    """What everybody must beat: 1, by definition of the unit."""
    return score(questions, [written(1, 1)] * len(questions), measure=measure, by_picture=True)


def _means(batches: Iterator[Pairs]) -> dict[str, Tensor]:
    """Teacher → mean of its features, [N, C] float64."""
    sums: dict[str, Tensor] = {}
    count = 0
    for pairs in batches:
        for name, (_, target) in pairs.items():
            total = target.double().sum(0)
            sums[name] = sums[name] + total if name in sums else total
        count += len(next(iter(pairs.values()))[1])
    if not count:
        raise ValueError("no training pictures: there is no mean to predict")
    return {name: total / count for name, total in sums.items()}


def _teachers(questions: Sequence[Question]) -> list[str]:
    return list(dict.fromkeys(question.meta["teacher"] for question in questions))
