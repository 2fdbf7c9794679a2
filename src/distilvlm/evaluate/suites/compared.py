"""Several models' answers to the same questions side by side, from the files that asking them wrote."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
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
    """Evaluations of the questions that all models answered, in one order."""

    each: tuple[Evaluation, ...]  # in the order of the files
    alone: int  # answers that not all of the files have
    asked: Mapping[str, Any]  # what the files say was asked; nothing of rows of a user's own


def compared(*files: str | Path) -> Compared:
    """Read files of answers; their figures and `report.difference` are of the questions that they share.

    Raises:
        DataError: they are of different suites or were asked otherwise (another prompt, say), or share no question.
        ValueError: a line that is no answer.
    """
    first, *others = [Path(file) for file in files]
    about, measure = _about(first), _measure(first, _about(first))
    for other in others:
        told = _about(other)
        for key in ("suite", "split", "prompt", "questions", "template", "shots"):
            if about.get(key) != told.get(key):
                raise DataError(
                    f"{first} and {other} answer different things: {key} is {about.get(key)!r} in one, "
                    f"{told.get(key)!r} in the other; ask both models alike"
                )
        if (its := _measure(other, told)) != measure:
            raise DataError(f"{first} is measured by {measure.name}, {other} by {its.name}")
    each = [{_key(one): one for one in answered(file)} for file in (first, *others)]
    shared = [key for key in each[0] if all(key in answers for answers in each)]
    if not shared:
        raise DataError(f"{' and '.join(map(str, files))} have no question in common")
    alone = sum(len(answers) - len(shared) for answers in each)
    if alone:
        logger.warning("%d answers are to questions that not all of the files have, and are left out", alone)
    by_picture = measure is not CHOICES
    found = (summed(tuple(one[key] for key in shared), measure, by_picture) for one in each)
    return Compared(tuple(found), alone, about)


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
