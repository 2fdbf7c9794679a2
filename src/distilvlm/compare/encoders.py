"""Question sets of students that are a vision encoder alone: labelled pictures, and teachers' features."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilvlm.data.geometry import content
from distilvlm.evaluate import Asked, Evaluation, Measure, answered, majority, score
from distilvlm.evaluate.encoders import (
    LABELS,
    NEIGHBOURS,
    OF_FEATURES,
    Labels,
    SubjectOfRun,
    Vectors,
    feature_questions,
    labelled,
    measured,
    pictures,
    predicting_the_mean,
    taken,
)
from distilvlm.evaluate.encoders.features import Pooling

from .schema import PREDICTS_THE_MEAN, QuestionSpec


@dataclass(frozen=True)
class PictureSet:
    """One set, ready to be asked."""

    spec: QuestionSpec
    asked: Asked  # of feature errors one question per teacher and picture, else the labelled test pictures
    training: Asked
    measure: Measure

    @property
    def labels(self) -> Labels:
        return Labels(self.training, self.asked)

    def score(self, predictions: list[str]) -> Evaluation:
        return score(self.asked.questions, predictions, measure=self.measure, by_picture=True)

    def again(self, out: Path) -> Evaluation:
        """What was written to `out`, judged anew."""
        found = self.score([sample.prediction for sample in answered(out)])
        found.write(out)
        return found

    def baselines(self) -> dict[str, Evaluation]:
        """What is right without looking: the most common class; of features, their mean."""
        (name,) = self.spec.baselines
        if name == PREDICTS_THE_MEAN:
            return {name: predicting_the_mean(self.asked.questions, self.measure)}
        usual = majority(question.answer for question in self.training.questions)
        return {name: self.score([usual] * len(self.asked.questions))}

    @property
    def stamp(self) -> dict[str, Any]:
        """What its answers depend on, beside the run."""
        pooling, neighbours = self.spec.pooling or "mean", self.spec.neighbours or NEIGHBOURS
        return {
            "questions": _contents(self.asked),
            "training": _contents(self.training),
            "pooling": pooling,
            "neighbours": neighbours,
        }


class EncoderAnswers:
    """The answers of one run's encoder."""

    def __init__(self, run: Path) -> None:
        self._student = SubjectOfRun(run)
        self._vectors: dict[Pooling, Vectors] = {}

    def answer(self, questions: object, out: Path) -> Evaluation:
        """What it says is written to `out`, too."""
        assert isinstance(questions, PictureSet)  # `Asker` chooses
        found = self._measured(questions)
        found.write(out)
        return found

    def _measured(self, questions: PictureSet) -> Evaluation:
        spec = questions.spec
        if spec.measure in OF_FEATURES:
            training = pictures(questions.training)
            return self._student.of_features(spec.measure, training, questions.asked.questions)
        pooling = spec.pooling or "mean"
        if pooling not in self._vectors:
            self._vectors[pooling] = Vectors(self._student.encoder, self._student.geometry, pooling)
        neighbours = spec.neighbours or NEIGHBOURS
        return measured(self._vectors[pooling], questions.labels, [spec.measure], neighbours)[spec.measure]


def read_pictures(spec: QuestionSpec) -> PictureSet:
    """Raises DataError where there are no labelled pictures, or test pictures of a class without training pictures."""
    assert spec.path is not None and spec.training is not None  # the schema's rule
    training = taken(labelled(spec.training, spec.training_images or spec.images), spec.take)
    test = labelled(spec.path, spec.images)
    if spec.measure in OF_FEATURES:
        assert spec.teachers is not None
        asked = Asked(test.name, feature_questions(test, spec.teachers))
        return PictureSet(spec, asked, training, OF_FEATURES[spec.measure])
    Labels(training, test)  # refuses test pictures of a class that no training picture has
    return PictureSet(spec, test, training, LABELS[spec.measure])


def _contents(asked: Asked) -> str:
    """A hash that changes with what is asked, and about which pictures."""
    digests = {path: content(path) for path in dict.fromkeys(pictures(asked))}
    lines = [f"{digests[one.record.images[0]]} {one.text} {one.answer}" for one in asked.questions]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
