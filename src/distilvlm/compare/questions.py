"""The question sets of a comparison, read: what is asked, what answers are judged by, what is right without looking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from distilvlm.data import raise_or_quarantine, read
from distilvlm.evaluate import (
    ACCURATE,
    EXACT,
    Asked,
    Evaluation,
    Measure,
    answered,
    asked_of,
    evaluate,
    majority,
    question_only,
    rescored,
    score,
)
from distilvlm.evaluate.generate import Features
from distilvlm.evaluate.grounding import GROUNDING, blind_answers
from distilvlm.evaluate.hallucination import POLLING, annotated, captions
from distilvlm.evaluate.text import CHOICES, PERPLEXITY, choose, perplexity, read_task, read_texts, sets_directory
from distilvlm.models.save import Geometry
from distilvlm.models.vlm import VLM
from distilvlm.recipe import SourceSpec

from .encoders import PictureSet, read_pictures
from .schema import ALWAYS_YES, BASELINES, QuestionSpec


class Questions(Protocol):
    """A question set, ready to be asked."""

    @property
    def spec(self) -> QuestionSpec: ...
    @property
    def place(self) -> Path: ...  # the file or directory that the questions come from

    def ask(self, vlm: VLM, geometry: Geometry, features: Features | None, out: Path) -> Evaluation:
        """Ask a student in its active workflow; what it says is written to `out`."""
        ...

    def again(self, out: Path) -> Evaluation:
        """What was written to `out`, judged anew: an answer depends on model and question alone, what it is worth on
        synonyms and annotations, too."""
        ...

    def baselines(self) -> dict[str, Evaluation]: ...


@dataclass(frozen=True)
class QuestionSet:
    """Questions that are answered in words."""

    spec: QuestionSpec
    asked: Asked
    training: Asked  # questions with the answers that baselines know
    measure: Measure

    @property
    def place(self) -> Path:
        return Path(self.spec.source.path)

    def ask(self, vlm: VLM, geometry: Geometry, features: Features | None, out: Path) -> Evaluation:
        return evaluate(
            vlm,
            self.asked,
            geometry,
            measure=self.measure,
            template=self.spec.template,
            batch_size=self.spec.batch,
            max_new_tokens=self.spec.max_new_tokens,
            features=features,
            out=out,
            by_picture=True,
        )

    def again(self, out: Path) -> Evaluation:
        found = self.score([sample.prediction for sample in answered(out)])
        found.write(out)
        return found

    def score(self, predictions: list[str]) -> Evaluation:
        return score(self.asked.questions, predictions, measure=self.measure, by_picture=True)

    def baselines(self) -> dict[str, Evaluation]:
        """What is right without looking: the most common training answer, the best guess from the question alone, and
        for polling, whoever always says yes. Of boxes, those that agree with most others."""
        pairs = [(question.text, question.answer) for question in self.training.questions]
        if self.spec.measure == "grounding":
            boxes = blind_answers(self.asked.questions, pairs)
            return {name: self.score(boxes[name]) for name in self.spec.baselines}
        usual, blind = majority(answer for _, answer in pairs), question_only(pairs)
        given = {
            BASELINES[0]: [usual for _ in self.asked.questions],
            BASELINES[1]: [blind(question.text) for question in self.asked.questions],
            ALWAYS_YES: ["yes" for _ in self.asked.questions],
        }
        return {name: self.score(given[name]) for name in self.spec.baselines}


@dataclass(frozen=True)
class TextSet:
    """What is measured by the probabilities of text, without a word of the student's own."""

    spec: QuestionSpec
    place: Path
    measure: Measure
    put: Callable[[VLM, Path], Evaluation]

    def ask(self, vlm: VLM, geometry: Geometry, features: Features | None, out: Path) -> Evaluation:
        return self.put(vlm, out)

    def again(self, out: Path) -> Evaluation:
        return rescored(out, measure=self.measure)

    def baselines(self) -> dict[str, Evaluation]:
        return {}


def read_questions(specs: Mapping[str, QuestionSpec]) -> dict[str, Questions | PictureSet]:
    """The files of all question sets.

    Raises:
        DataError: rows that can't be used, or that the measure can't judge.
    """
    return {name: read_pictures(spec) if spec.of_encoders else _read(name, spec) for name, spec in specs.items()}


def _read(name: str, spec: QuestionSpec) -> Questions:
    if spec.measure == "choices":
        return _choices(spec)
    if spec.measure == "perplexity":
        return _perplexity(spec)
    assert spec.training is not None  # the schema's rule
    asked = _asked(spec.source, name)
    images = spec.training_images or spec.images
    training = _asked(SourceSpec(path=spec.training, images=images), "training")
    if spec.measure != "captions":
        measures = {"exact": EXACT, "accurate": ACCURATE, "polling": POLLING, "grounding": GROUNDING}
        return QuestionSet(spec, asked, training, measures[spec.measure])
    asked, table = annotated(asked, spec.annotations, spec.synonyms, training.questions)
    return QuestionSet(spec, asked, training, captions(table))


def _asked(source: SourceSpec, name: str) -> Asked:
    found = asked_of(read(source, name))
    raise_or_quarantine(found.bad, "fatal")
    return found


def _choices(spec: QuestionSpec) -> TextSet:
    assert spec.task is not None  # the schema's rule
    found = read_task(spec.task, spec.path, split=spec.split, shots=spec.shots, limit=spec.limit)
    place = sets_directory() if spec.path is None else Path(spec.path)
    return TextSet(spec, place, CHOICES, lambda vlm, out: choose(vlm, found, batch_size=spec.batch, out=out))


def _perplexity(spec: QuestionSpec) -> TextSet:
    assert spec.path is not None  # the schema's rule
    texts = read_texts(spec.path)

    def put(vlm: VLM, out: Path) -> Evaluation:
        return perplexity(vlm, texts, window=spec.window, stride=spec.stride, batch_size=spec.batch, out=out)

    return TextSet(spec, Path(spec.path), PERPLEXITY, put)
