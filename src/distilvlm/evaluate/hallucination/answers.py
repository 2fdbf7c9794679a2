"""Answers that are there already, in the forms that they come in, put to their questions.

JSON or JSONL, an object per answer. The answer is the first of `prediction` (what `--out` writes), `model_answer`
(MMHal-Bench), `text` (LLaVA, Object HalBench), `caption` (CHAIR), `answer` (POPE). It belongs to its question by
(`row`, `turn`), else by `question_id` or `id` where both sides have each once, else by order; a question that stands
with the answer (`question`, `prompt`) must be the one that it is put to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilvlm.data.problems import DataError
from distilvlm.data.rows import rows
from distilvlm.evaluate.questions import Question

FIELDS = ("prediction", "model_answer", "text", "caption", "answer")
ASKED = ("question", "prompt")
IDENTITIES = ("question_id", "id")


def read_answers(path: str | Path, questions: Sequence[Question]) -> list[str]:
    """The answer to each question, in the questions' order.

    Raises:
        DataError: a row without an answer, more or fewer answers than questions, or an answer to another question;
            names file and row.
    """
    path = Path(path)
    found = list(rows(path))
    for number, row in enumerate(found):
        if not isinstance(row, Mapping) or _answer(row) is None:
            raise DataError(f"{path}, row {number}: no answer: write it as {', '.join(FIELDS[:-1])} or {FIELDS[-1]}")
    if len(found) != len(questions):
        raise DataError(f"{path} has {len(found)} answers for {len(questions)} questions")
    order = _by_place(found, questions) or _by_identity(found, questions) or list(range(len(found)))
    answers: list[str] = []
    for question, number in zip(questions, order, strict=True):
        told = next((found[number][key] for key in ASKED if isinstance(found[number].get(key), str)), None)
        if told is not None and _plain(told) != _plain(question.text):
            key = question.record.key
            raise DataError(
                f"{path}, row {number} answers {told!r}, but the question of {key.file}, row {key.row} is "
                f"{question.text!r}: give the answers in the questions' order"
            )
        answers.append(_answer(found[number]) or "")
    return answers


def _answer(row: Mapping[str, Any]) -> str | None:
    return next((row[key] for key in FIELDS if isinstance(row.get(key), str)), None)


def _by_place(found: Sequence[Mapping[str, Any]], questions: Sequence[Question]) -> list[int] | None:
    """Numbers of the answers, by row and turn (of one file, or of several in their order)."""
    if not all(isinstance(row.get("row"), int) and isinstance(row.get("turn"), int) for row in found):
        return None
    named = {(str(row.get("file")), row["row"], row["turn"]): number for number, row in enumerate(found)}
    given = list(dict.fromkeys(file for file, _, _ in named))
    wanted = list(dict.fromkeys(question.record.key.file for question in questions))
    if len(given) != len(wanted) or len(named) != len(found):
        return None
    renamed = dict(zip(wanted, given, strict=True))  # the same file may be called by another path
    places = [(renamed[file], row, turn) for file, row, turn in (question.place for question in questions)]
    return [named[place] for place in places] if all(place in named for place in places) else None


def _by_identity(found: Sequence[Mapping[str, Any]], questions: Sequence[Question]) -> list[int] | None:
    wanted = [question.record.id for question in questions]
    for key in IDENTITIES:
        named = {str(row[key]): number for number, row in enumerate(found) if key in row}
        if len(named) == len(found) and len({*wanted}) == len(wanted) and {*named} == {*wanted}:
            return [named[identity] for identity in wanted]
    return None


def _plain(text: str) -> str:
    return " ".join(text.replace("<image>", " ").split())
