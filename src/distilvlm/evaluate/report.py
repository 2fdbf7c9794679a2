"""An evaluation: questions, the answers that were given, and what they are worth."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distilvlm.data.batch import BadRow
from distilvlm.data.geometry import Geometry
from distilvlm.data.problems import DataError, raise_or_quarantine
from distilvlm.data.readers import Source
from distilvlm.data.template import Kind
from distilvlm.evaluate.generate import Features, answer
from distilvlm.evaluate.metrics import RESAMPLES, Interval, accurate, exact_match, interval, paired_difference
from distilvlm.evaluate.questions import Question, questions_of
from distilvlm.models.files import write_whole
from distilvlm.models.vlm import VLM

logger = logging.getLogger(__name__)

Measure = Literal["exact", "accurate"]


@dataclass(frozen=True, slots=True)
class Answered:
    """One question with its true answer and the model's."""

    file: str
    row: int  # 0-based row of the file
    turn: int  # 0-based number of the answer in its conversation
    id: str
    pictures: tuple[str, ...]
    question: str
    answer: str
    prediction: str
    exact: bool
    accurate: bool


@dataclass(frozen=True)
class Evaluation:
    """Every question with its prediction, and the means with their 95% intervals."""

    samples: tuple[Answered, ...]
    exact_match: Interval
    accuracy: Interval
    by_picture: bool  # the intervals draw whole pictures, with all their questions
    bad: tuple[BadRow, ...] = ()  # rows that could not be used, hence were not asked

    @property
    def n(self) -> int:
        return len(self.samples)

    def summary(self) -> dict[str, Any]:
        """What `--json` prints: numbers only, the samples are in the JSONL file."""
        return {
            "n": self.n,
            "pictures": len({sample.pictures for sample in self.samples if sample.pictures}),
            "bad_rows": len(self.bad),
            "exact_match": asdict(self.exact_match),
            "accuracy": asdict(self.accuracy),
            "intervals": "bootstrap over pictures" if self.by_picture else "bootstrap over questions",
        }

    def write(self, path: str | Path) -> None:
        """One JSON object per question, in order; the file appears whole or not at all."""
        lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in self.samples)
        write_whole(path, "".join(lines).encode())


def evaluate(
    vlm: VLM,
    source: Source,
    geometry: Geometry,
    *,
    template: Kind | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    features: Features | None = None,
    out: str | Path | None = None,
    by_picture: bool = False,
    on_bad_row: Literal["fatal", "quarantine"] = "fatal",
    progress: Callable[[int, int], object] | None = None,
) -> Evaluation:
    """Ask the model every question of a data source (see `questions_of`) and score its greedy answers.

    Args:
        source: from `data.readers.read`; its bad rows stop the evaluation, or are left out and counted.
        geometry: as in the model's training.
        template: as in the model's training; default: what the source's specification says.
        features: kept features of the vision tower, by picture path; None runs the tower.
        out: file for one JSON line per question.
        by_picture: draw whole pictures in the bootstrap (questions on one picture are not independent).
        progress: called with the number of questions answered and their total.

    Raises:
        DataError: bad rows with `on_bad_row="fatal"`, a picture that can't be decoded, a question longer than the
            model's context, or no question at all. Each names file and row.
    """
    raise_or_quarantine(source.bad, on_bad_row)
    bad = list(source.bad)
    asked = list(questions_of(source.records))
    predictions = answer(
        vlm,
        [question.record for question in asked],
        template or source.spec.template,
        geometry,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        features=features,
        bad=None if on_bad_row == "fatal" else bad,
        progress=progress,
    )
    bad = list(dict.fromkeys(bad))  # a row with several questions is told of once
    unusable = {row.key for row in bad}
    given = [
        (question, text)
        for question, text in zip(asked, predictions, strict=True)
        if question.record.key not in unusable
    ]
    if not given:
        raise DataError(f"{source.spec.path}: no question can be asked ({len(unusable)} rows can't be used)")
    evaluation = score([q for q, _ in given], [text for _, text in given], by_picture=by_picture, bad=bad)
    logger.info("%d questions: exact match %s, accuracy %s", evaluation.n, evaluation.exact_match, evaluation.accuracy)
    if out is not None:
        evaluation.write(out)
    return evaluation


def score(
    asked: Sequence[Question],
    predictions: Sequence[str],
    *,
    by_picture: bool = False,
    bad: Iterable[BadRow] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Score predictions that were made by anything, e.g. a baseline. Raises ValueError when their numbers differ."""
    if len(asked) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(asked)} questions")
    samples = tuple(
        Answered(
            file=question.record.key.file,
            row=question.record.key.row,
            turn=question.turn,
            id=question.record.id,
            pictures=question.record.images,
            question=question.text,
            answer=question.answer,
            prediction=prediction,
            exact=exact_match(prediction, question.answer),
            accurate=accurate(prediction, question.answer),
        )
        for question, prediction in zip(asked, predictions, strict=True)
    )
    return _evaluation(samples, by_picture, bad, resamples, seed)


def rescored(file: str | Path, *, by_picture: bool = False, resamples: int = RESAMPLES, seed: int = 0) -> Evaluation:
    """The evaluation that `Evaluation.write` wrote to `file`.

    Raises ValueError for a line that it did not write, naming it.
    """
    samples: list[Answered] = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            samples.append(Answered(**{**values, "pictures": tuple(values["pictures"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number} is no answered question: {error}") from None
    if not samples:
        raise ValueError(f"{file} holds no answered question")
    return _evaluation(tuple(samples), by_picture, (), resamples, seed)


def _evaluation(
    samples: tuple[Answered, ...], by_picture: bool, bad: Iterable[BadRow], resamples: int, seed: int
) -> Evaluation:
    clusters = _clusters(samples) if by_picture else None
    return Evaluation(
        samples,
        interval(_right(samples, "exact"), clusters, resamples, seed),
        interval(_right(samples, "accurate"), clusters, resamples, seed),
        by_picture,
        tuple(bad),
    )


def difference(a: Evaluation, b: Evaluation, measure: Measure = "accurate", seed: int = 0) -> Interval:
    """a - b with its paired 95% interval, by picture where both are. Raises ValueError when they asked differently."""
    for one, other in zip(a.samples, b.samples, strict=False):
        if (one.row, one.turn, one.question, one.answer) != (other.row, other.turn, other.question, other.answer):
            raise ValueError(
                f"the evaluations asked different questions: {one.file} row {one.row} turn {one.turn} in one, "
                f"{other.file} row {other.row} turn {other.turn} in the other"
            )
    clusters = _clusters(a.samples) if a.by_picture and b.by_picture else None
    return paired_difference(_right(a.samples, measure), _right(b.samples, measure), clusters, seed=seed)


def _right(samples: Sequence[Answered], measure: Measure) -> np.ndarray:
    return np.array([getattr(sample, measure) for sample in samples], dtype=np.float64)


def _clusters(samples: Sequence[Answered]) -> list[object]:
    """The picture of each question; a text-only question stands for itself."""
    return [sample.pictures or (sample.row, sample.turn) for sample in samples]
