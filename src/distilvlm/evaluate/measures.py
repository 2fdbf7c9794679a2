"""What answers are worth: a measure judges each answer and sums that up in figures.

A measure is data, and every figure is a function of sums over answers, as a rule their ratio: so any measure has
intervals over pictures and paired differences, and is shown by tables, comparisons and reports, which know none of them
by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from distilvlm.evaluate.metrics import Combined, Interval, Transform, accurate, divided, exact_match
from distilvlm.evaluate.questions import Question


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
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the measure found in the answer; `right` and `verdict` (in words) are among it, unless it is empty."""

    @classmethod
    def of(cls, question: Question, prediction: str, details: Mapping[str, Any]) -> Answered:
        key = question.record.key
        return cls(
            file=key.file,
            row=key.row,
            turn=question.turn,
            id=question.record.id,
            pictures=question.record.images,
            question=question.text,
            answer=question.answer,
            prediction=prediction,
            exact=exact_match(prediction, question.answer),
            accurate=accurate(prediction, question.answer),
            details=details,
        )

    def as_json(self) -> dict[str, Any]:
        """As a line of an answers file; without `details` where the measure found none."""
        values = asdict(self)
        return values if self.details else {key: value for key, value in values.items() if key != "details"}


@dataclass(frozen=True)
class Figure:
    """One number over all answers: sum of the first parts / sum of the second, undefined where those sum to 0; or
    what is `combined` of the sums of any number of parts."""

    name: str  # in JSON
    title: str  # in tables
    parts: Callable[[Answered], tuple[float, ...]] = field(compare=False)
    better: Literal["higher", "lower", "neither"] = "higher"
    about: str = ""  # a sentence for whoever reads a report
    percent: bool = True  # a share; otherwise a number as it is
    headline: bool = True  # stands in tables; others are folded away, or in JSON only
    transform: Transform | None = field(default=None, compare=False)  # the number is this of the quotient of the sums
    combined: Combined | None = field(default=None, compare=False)

    def of(self, totals: np.ndarray) -> np.ndarray:
        """The figure of sums of its parts, [m, parts] to [m]; not a number where it is undefined."""
        if self.combined is not None:
            return self.combined(totals)
        quotient = divided(totals[:, 0], totals[:, 1])
        return quotient if self.transform is None else self.transform(quotient)

    def text(self, value: Interval | None) -> str:
        """The value with its interval, for a sentence: `87.1% (86.5 to 87.7)`."""
        if value is None or self.percent:
            return "undefined" if value is None else str(value)
        return f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"

    def cell(self, value: Interval | None, sign: str = "") -> str:
        """The same for a table whose head says what the unit is: `87.1 [86.5, 87.7]`; `sign="+"` for a difference."""
        if value is None:
            return "undefined"
        unit, digits = (100, 1) if self.percent else (1, 2)
        mean, low, high = (f"{unit * one:{sign}.{digits}f}" for one in (value.mean, value.low, value.high))
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Measure:
    """How answers are judged and what is told of them.

    Args:
        name: as a comparison file says it.
        figures: the first is the main one: differences are of it.
        judge: question and answer → `Answered.details`.
        category: the detail by which figures are also told apart (the kind of question), if there is one.
        categories: those that come first, in order; others follow in the order in which they come.
        settle: adds to the answers' details what only all of them together tell (whether both questions about a
            picture are right, how rare a phrase is); where answers are judged, not where they are read back.
    """

    name: str
    figures: tuple[Figure, ...]
    judge: Callable[[Question, str], Mapping[str, Any]] = field(compare=False)
    category: str | None = None
    categories: tuple[str, ...] = ()
    settle: Callable[[Sequence[Answered]], Sequence[Answered]] | None = field(default=None, compare=False)

    @property
    def main(self) -> Figure:
        return self.figures[0]

    def figure(self, name: str) -> Figure:
        """Raises ValueError for a name that is none of its figures."""
        for one in self.figures:
            if one.name == name:
                return one
        raise ValueError(
            f"measure '{self.name}' has no figure '{name}', only {', '.join(f.name for f in self.figures)}"
        )

    def led_by(self, *names: str) -> Measure:
        """The same measure with these figures first."""
        first = tuple(self.figure(name) for name in names)
        return replace(self, figures=first + tuple(figure for figure in self.figures if figure not in first))


def _nothing(question: Question, prediction: str) -> Mapping[str, Any]:
    return {}


_RULES = "Accuracy forgives case, articles and punctuation, exact match nothing."
_ACCURACY = Figure("accuracy", "accuracy", lambda one: (one.accurate, 1), about=_RULES)
_EXACT_MATCH = Figure("exact_match", "exact match", lambda one: (one.exact, 1), about=_RULES, headline=False)

ACCURATE = Measure("accurate", (_ACCURACY, _EXACT_MATCH), _nothing)
"""The same answer after VQA's normalisation; beside it, the same string."""

EXACT = Measure("exact", (replace(_EXACT_MATCH, headline=True), replace(_ACCURACY, headline=False)), _nothing)
"""The same string; beside it, the same answer after VQA's normalisation."""
