"""An evaluation: questions, the answers that were given, and what they are worth."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distilvlm.data.batch import BadRow
from distilvlm.data.geometry import Geometry
from distilvlm.data.problems import DataError, raise_or_quarantine
from distilvlm.data.readers import Source
from distilvlm.data.template import Kind
from distilvlm.evaluate.generate import Features, answer
from distilvlm.evaluate.measures import ACCURATE, Answered, Figure, Measure
from distilvlm.evaluate.metrics import (
    RESAMPLES,
    Interval,
    divided,
    of_sums,
    paired_of_sums,
    paired_ratios,
    ratio,
)
from distilvlm.evaluate.questions import Asked, Question, questions_of
from distilvlm.models.files import write_whole
from distilvlm.models.vlm import VLM

logger = logging.getLogger(__name__)

Figures = Mapping[str, Interval | None]
"""Name of a figure → its value with its 95% interval; None where it is undefined."""


@dataclass(frozen=True)
class Evaluation:
    """Every question with its prediction, and the measure's figures with their 95% intervals."""

    samples: tuple[Answered, ...]
    measure: Measure = field(compare=False)
    figures: Figures
    categories: Mapping[str, Figures]  # the same, of each kind of question that the measure tells apart
    by_picture: bool  # the intervals draw whole pictures, with all their questions
    bad: tuple[BadRow, ...] = ()  # rows that could not be used, hence were not asked

    @property
    def n(self) -> int:
        return len(self.samples)

    @property
    def main(self) -> Interval | None:
        return self.figures[self.measure.main.name]

    @property
    def exact_match(self) -> Interval:
        return self._defined("exact_match")

    @property
    def accuracy(self) -> Interval:
        return self._defined("accuracy")

    def _defined(self, name: str) -> Interval:
        found = self.figures[self.measure.figure(name).name]
        assert found is not None  # a mean over questions, of which there is at least one
        return found

    def summary(self) -> dict[str, Any]:
        """What `--json` prints: numbers only, the samples are in the JSONL file. An undefined figure is null."""
        categories = {
            name: {"n": sum(_category(self.measure, sample) == name for sample in self.samples), **_json(figures)}
            for name, figures in self.categories.items()
        }
        return {
            "n": self.n,
            "pictures": len({sample.pictures for sample in self.samples if sample.pictures}),
            "bad_rows": len(self.bad),
            **_json(self.figures),
            **({"categories": categories} if categories else {}),
            "intervals": "bootstrap over pictures" if self.by_picture else "bootstrap over questions",
        }

    def write(self, path: str | Path) -> None:
        """One JSON object per question, in order; the file appears whole or not at all."""
        write_whole(path, self.lines().encode())

    def lines(self) -> str:
        """What `write` writes."""
        return "".join(json.dumps(sample.as_json(), ensure_ascii=False) + "\n" for sample in self.samples)


def evaluate(
    vlm: VLM,
    source: Source | Asked,
    geometry: Geometry,
    *,
    measure: Measure = ACCURATE,
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
        source: from `data.readers.read`, or questions of any other file; its bad rows stop the evaluation, or are left
            out and counted.
        geometry: as in the model's training.
        measure: what the answers are judged by.
        template: as in the model's training; default: what the source's specification says.
        features: kept features of the vision tower, by picture path; None runs the tower.
        out: file for one JSON line per question.
        by_picture: draw whole pictures in the bootstrap (questions on one picture are not independent).
        progress: called with the number of questions answered and their total.

    Raises:
        DataError: bad rows with `on_bad_row="fatal"`, a picture that can't be decoded, a question longer than the
            model's context, or no question at all. Each names file and row.
    """
    asked, predictions = ask(
        vlm,
        source,
        geometry,
        template=template,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        features=features,
        on_bad_row=on_bad_row,
        progress=progress,
    )
    evaluation = score(asked.questions, predictions, measure=measure, by_picture=by_picture, bad=asked.bad)
    said = (f"{figure.title} {figure.text(evaluation.figures[figure.name])}" for figure in measure.figures)
    logger.info("%d questions: %s", evaluation.n, ", ".join(said))
    if out is not None:
        evaluation.write(out)
    return evaluation


def ask(
    vlm: VLM,
    source: Source | Asked,
    geometry: Geometry,
    *,
    template: Kind | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    features: Features | None = None,
    on_bad_row: Literal["fatal", "quarantine"] = "fatal",
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Asked, list[str]]:
    """The questions that could be asked, with the rows that could not, and the model's greedy answer to each.

    Arguments and errors as those of `evaluate`.
    """
    if isinstance(source, Source):
        template = template or source.spec.template
        source = Asked(source.spec.path, tuple(questions_of(source.records)), tuple(source.bad))
    raise_or_quarantine(source.bad, on_bad_row)
    bad = list(source.bad)
    predictions = answer(
        vlm,
        [question.record for question in source.questions],
        template or "chat",
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
        for question, text in zip(source.questions, predictions, strict=True)
        if question.record.key not in unusable
    ]
    if not given:
        raise DataError(f"{source.name}: no question can be asked ({len(unusable)} rows can't be used)")
    return Asked(source.name, tuple(question for question, _ in given), tuple(bad)), [text for _, text in given]


def score(
    asked: Sequence[Question],
    predictions: Sequence[str],
    *,
    measure: Measure = ACCURATE,
    by_picture: bool = False,
    bad: Iterable[BadRow] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Score predictions that were made by anything, e.g. a baseline. Raises ValueError when their numbers differ."""
    if len(asked) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(asked)} questions")
    samples = tuple(
        Answered.of(question, prediction, measure.judge(question, prediction))
        for question, prediction in zip(asked, predictions, strict=True)
    )
    if measure.settle is not None:
        samples = tuple(measure.settle(samples))
    return summed(samples, measure, by_picture, bad, resamples, seed)


def rescored(
    file: str | Path,
    *,
    measure: Measure = ACCURATE,
    by_picture: bool = False,
    bad: Iterable[BadRow] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """The evaluation that `Evaluation.write` wrote to `file`, by the measure that it was judged by.

    Raises ValueError for a line that it did not write, naming it.
    """
    return summed(answered(file), measure, by_picture, bad, resamples, seed)


def answered(file: str | Path) -> tuple[Answered, ...]:
    """The answers that `Evaluation.write` wrote to `file`. Raises ValueError for a line that it did not write."""
    samples: list[Answered] = []
    # str.splitlines would also break at U+2028 and the like, which stand unescaped in answers.
    lines = Path(file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            samples.append(Answered(**{**values, "pictures": tuple(values["pictures"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number} is no answered question: {error}") from None
    if not samples:
        raise ValueError(f"{file} holds no answered question")
    return tuple(samples)


def summed(
    samples: tuple[Answered, ...],
    measure: Measure,
    by_picture: bool = False,
    bad: Iterable[BadRow] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """The figures of answers that are judged already."""

    def figures(chosen: Sequence[Answered]) -> dict[str, Interval | None]:
        clusters = _clusters(chosen) if by_picture else None
        return {one.name: _value(chosen, one, clusters, resamples, seed) for one in measure.figures}

    kinds = dict.fromkeys(name for sample in samples if (name := _category(measure, sample)) is not None)
    ordered = [name for name in measure.categories if name in kinds]
    ordered += [name for name in kinds if name not in measure.categories]
    categories = {name: figures([s for s in samples if _category(measure, s) == name]) for name in ordered}
    return Evaluation(samples, measure, figures(samples), categories, by_picture, tuple(bad))


def difference(a: Evaluation, b: Evaluation, figure: str | None = None, seed: int = 0) -> Interval | None:
    """a - b in a figure (default: the measure's main one) with its paired 95% interval, by picture where both are.

    None where the figure is undefined for one of them. Raises ValueError when they asked differently.
    """
    for one, other in zip(a.samples, b.samples, strict=False):
        if (one.row, one.turn, one.question, one.answer) != (other.row, other.turn, other.question, other.answer):
            raise ValueError(
                f"the evaluations asked different questions: {one.file} row {one.row} turn {one.turn} in one, "
                f"{other.file} row {other.row} turn {other.turn} in the other"
            )
    clusters = _clusters(a.samples) if a.by_picture and b.by_picture else None
    wanted = a.measure.main if figure is None else a.measure.figure(figure)
    first, second = _parts(a.samples, wanted), _parts(b.samples, wanted)
    if wanted.combined is not None:
        return paired_of_sums(first, second, wanted.combined, clusters, seed=seed)
    parts = (first[:, 0], first[:, 1]), (second[:, 0], second[:, 1])
    return paired_ratios(*parts, clusters, seed=seed, transform=wanted.transform)


def gap_closed(
    student: Evaluation, control: Evaluation, teacher: Evaluation, figure: str | None = None, seed: int = 0
) -> Interval | None:
    """How much of what the teacher is ahead of the control the student has made good, (student - control) /
    (teacher - control), with its 95% interval: all three are drawn anew together, by picture where all are.

    None where there is no such gap: the paired interval of teacher - control does not exclude 0 on the better side, the
    figure has no better side, or it is undefined for one of them. Then nothing can be closed, and the quotient would be
    one of noise. Raises ValueError when they asked differently.
    """
    wanted = student.measure.main if figure is None else student.measure.figure(figure)
    sign = {"higher": 1, "lower": -1, "neither": 0}[wanted.better]
    lead = difference(teacher, control, wanted.name, seed)
    difference(student, control, wanted.name, seed)  # refuses other questions
    if lead is None or min(sign * lead.low, sign * lead.high) <= 0:
        return None
    all_three = (student, control, teacher)
    columns = np.concatenate([_parts(one.samples, wanted) for one in all_three], axis=1)
    width = columns.shape[1] // 3

    def share(totals: np.ndarray) -> np.ndarray:
        own, low, high = (wanted.of(totals[:, place * width : (place + 1) * width]) for place in range(3))
        ahead = sign * (high - low)
        return divided(sign * (own - low), np.where(ahead > 0, ahead, 0))

    clusters = _clusters(student.samples) if all(one.by_picture for one in all_three) else None
    return of_sums(columns, share, clusters, seed=seed)


def _value(
    samples: Sequence[Answered], figure: Figure, clusters: list[object] | None, resamples: int, seed: int
) -> Interval | None:
    columns = _parts(samples, figure)
    if figure.combined is not None:
        return of_sums(columns, figure.combined, clusters, resamples, seed)
    return ratio(columns[:, 0], columns[:, 1], clusters, resamples, seed, figure.transform)


def _parts(samples: Sequence[Answered], figure: Figure) -> np.ndarray:
    """[samples, parts]: numerators and denominators, unless the figure combines others."""
    return np.array([figure.parts(sample) for sample in samples], dtype=np.float64)


def _clusters(samples: Sequence[Answered]) -> list[object]:
    """The picture of each question; a text-only question stands for itself."""
    return [sample.pictures or (sample.file, sample.row, sample.turn) for sample in samples]


def _category(measure: Measure, sample: Answered) -> str | None:
    found = sample.details.get(measure.category) if measure.category else None
    return None if found is None else str(found)


def _json(figures: Figures) -> dict[str, Any]:
    return {name: None if found is None else asdict(found) for name, found in figures.items()}
