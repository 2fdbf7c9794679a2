"""An encoder measured on labelled pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distilvlm.data import DataError
from distilvlm.data.convert.split import drawn
from distilvlm.data.geometry import content
from distilvlm.evaluate.encoders.features import Vectors
from distilvlm.evaluate.encoders.labelled import classes, pictures
from distilvlm.evaluate.encoders.measures import LABELS
from distilvlm.evaluate.encoders.nearest import NEIGHBOURS, nearest
from distilvlm.evaluate.encoders.probe import Probe, fitted
from distilvlm.evaluate.questions import Asked
from distilvlm.evaluate.report import Evaluation, score

HELD_OUT = 0.2
"""Share of the training pictures on which a probe's penalty is chosen. Ours."""


@dataclass(frozen=True)
class Labels:
    """Training and test pictures with their classes."""

    training: Asked
    test: Asked

    def __post_init__(self) -> None:
        unknown = sorted({*classes(self.test)} - {*classes(self.training)})
        if unknown:
            raise DataError(
                f"{self.test.name} has pictures of {unknown}, which {self.training.name} has none of: no class can be "
                "told that was never shown; leave them out, or give training pictures of them"
            )

    @property
    def numbers(self) -> Tensor:
        """[training pictures] int64: each one's class, as its place in the alphabet."""
        order = {name: number for number, name in enumerate(classes(self.training))}
        return torch.tensor([order[question.answer] for question in self.training.questions])

    def named(self, numbers: Tensor) -> list[str]:
        names = classes(self.training)
        return [names[number] for number in numbers.tolist()]

    def held_out(self, share: float = HELD_OUT, seed: int = 0) -> Tensor:
        """[training pictures] bool, a function of each picture's content: copies of one stay on one side."""
        return torch.tensor([drawn(content(path), seed) < share for path in pictures(self.training)])


def measured(
    vectors: Vectors, labels: Labels, measures: Iterable[str] = tuple(LABELS), neighbours: int = NEIGHBOURS
) -> dict[str, Evaluation]:
    """Measure ("knn", "probe") → every test picture's class as the encoder's vectors tell it.

    Raises:
        PictureError: a picture can't be read.
        ValueError: pooling by CLS without one, or too few training pictures to choose a probe's penalty.
    """
    training = vectors.of(pictures(labels.training))
    test = vectors.of(pictures(labels.test))
    told: dict[str, Tensor] = {}
    for name in measures:
        if name == "knn":
            told[name] = nearest(training, labels.numbers, test, neighbours)
        else:
            told[name] = probe_of(training, labels).classes(test)
    return {name: scored(labels, labels.named(numbers), name) for name, numbers in told.items()}


def scored(labels: Labels, predictions: Sequence[str], measure: str) -> Evaluation:
    """What classes, however they were told, are worth; intervals are over pictures."""
    return score(labels.test.questions, predictions, measure=LABELS[measure], by_picture=True)


def probe_of(training: Tensor, labels: Labels) -> Probe:
    """The probe fitted to the vectors of the training pictures, [n, d]."""
    return fitted(training, labels.numbers, labels.held_out())
