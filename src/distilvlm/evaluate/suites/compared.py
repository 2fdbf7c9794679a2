"""Two models' answers to the same questions side by side, from the files that asking them wrote."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilvlm.data.problems import DataError
from distilvlm.evaluate.measures import ACCURATE, Answered, Measure
from distilvlm.evaluate.report import Evaluation, answered, summed
from distilvlm.evaluate.suites.catalogue import READ
from distilvlm.evaluate.text.choices import CHOICES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """Both evaluations, of the questions that both models answered, in one order."""

    a: Evaluation
    b: Evaluation
    alone: int  # answers that only one of the files has


def compared(a: str | Path, b: str | Path) -> Compared:
    """Read two files of answers; their figures and `report.difference` are of the questions that they share.

    Raises:
        DataError: they are of different suites or were asked otherwise (another prompt, say), or share no question.
        ValueError: a line that is no answer.
    """
    told = _about(Path(a)), _about(Path(b))
    for key in ("suite", "split", "prompt", "questions", "template", "shots"):
        if told[0].get(key) != told[1].get(key):
            raise DataError(
                f"{a} and {b} answer different things: {key} is {told[0].get(key)!r} in one, {told[1].get(key)!r} in "
                "the other; ask both models alike"
            )
    measures = _measure(Path(a), told[0]), _measure(Path(b), told[1])
    if measures[0] != measures[1]:
        raise DataError(f"{a} is measured by {measures[0].name}, {b} by {measures[1].name}")
    each = [{_key(one): one for one in answered(file)} for file in (a, b)]
    both = [key for key in each[0] if key in each[1]]
    if not both:
        raise DataError(f"{a} and {b} have no question in common")
    alone = sum(len(answers) - len(both) for answers in each)
    if alone:
        logger.warning("%d answers are to questions that only one of the files has, and are left out", alone)
    by_picture = measures[0] is not CHOICES
    first, second = (summed(tuple(one[key] for key in both), measures[0], by_picture) for one in each)
    return Compared(first, second, alone)


def _key(one: Answered) -> tuple[Any, ...]:
    """Where files lie does not matter, what was asked does."""
    return Path(one.file).name, one.row, one.turn, one.id, one.question, one.answer


def _about(file: Path) -> dict[str, Any]:
    """What OUT.json says was asked; nothing of answers to rows of a user's own, beside which there is none."""
    try:
        return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["asked"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file.with_suffix('.json')} does not say what {file} answers") from None


def _measure(file: Path, about: dict[str, Any]) -> Measure:
    """The measure whose figures the file's answers were judged for."""
    name = about.get("measure")
    if name is None:
        if answered(file)[0].details:
            raise DataError(f"nothing says what {file} answers: {file.with_suffix('.json').name} belongs beside it")
        return ACCURATE
    found = READ.get(name)
    if found is None:
        raise DataError(f"{file} is measured by '{name}', which this version does not know")
    return found
