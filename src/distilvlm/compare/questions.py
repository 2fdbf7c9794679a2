"""The question sets of a comparison, read: what is asked, what answers are judged by, what is right without looking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilvlm.data import raise_or_quarantine, read
from distilvlm.evaluate import (
    ACCURATE,
    EXACT,
    Asked,
    Evaluation,
    Measure,
    asked_of,
    majority,
    question_only,
    score,
)
from distilvlm.evaluate.hallucination import POLLING, annotated, captions
from distilvlm.models.files import sha256
from distilvlm.recipe import SourceSpec

from .encoders import PictureSet, read_pictures
from .schema import ALWAYS_YES, BASELINES, QuestionSpec


@dataclass(frozen=True)
class QuestionSet:
    """One set of a student that answers in words, ready to be asked."""

    spec: QuestionSpec
    asked: Asked
    training: Asked  # questions with the answers that baselines know
    measure: Measure

    @property
    def stamp(self) -> dict[str, Any]:
        """What its answers depend on, beside the run."""
        asked = self.spec.model_dump(include={"template", "batch", "max_new_tokens"})
        return {"questions": sha256(Path(self.spec.path)), **asked}

    def score(self, predictions: list[str]) -> Evaluation:
        return score(self.asked.questions, predictions, measure=self.measure, by_picture=True)

    def baselines(self) -> dict[str, Evaluation]:
        """What is right without looking: the most common training answer, the best guess from the question alone, and
        for polling, whoever always says yes."""
        pairs = [(question.text, question.answer) for question in self.training.questions]
        usual, blind = majority(answer for _, answer in pairs), question_only(pairs)
        given = {
            BASELINES[0]: [usual for _ in self.asked.questions],
            BASELINES[1]: [blind(question.text) for question in self.asked.questions],
            ALWAYS_YES: ["yes" for _ in self.asked.questions],
        }
        return {name: self.score(given[name]) for name in self.spec.baselines}


def read_questions(specs: Mapping[str, QuestionSpec]) -> dict[str, QuestionSet | PictureSet]:
    """The files of all question sets.

    Raises:
        DataError: rows that can't be used, or that the measure can't judge.
    """
    return {name: read_pictures(spec) if spec.of_encoders else _read(name, spec) for name, spec in specs.items()}


def _read(name: str, spec: QuestionSpec) -> QuestionSet:
    asked = _asked(spec.source, name)
    images = spec.training_images or spec.images
    training = _asked(SourceSpec(path=spec.training, images=images), "training")
    if spec.measure != "captions":
        measure = {"exact": EXACT, "accurate": ACCURATE, "polling": POLLING}[spec.measure]
        return QuestionSet(spec, asked, training, measure)
    asked, table = annotated(asked, spec.annotations, spec.synonyms, training.questions)
    return QuestionSet(spec, asked, training, captions(table))


def _asked(source: SourceSpec, name: str) -> Asked:
    found = asked_of(read(source, name))
    raise_or_quarantine(found.bad, "fatal")
    return found
