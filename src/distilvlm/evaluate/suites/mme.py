"""MME (Fu et al. 2023): two questions about every picture, one answered by yes and one by no, in fourteen subtasks.

A subtask's score is 100 times accuracy plus accuracy+ (pictures with both answers right): 200 at most. Perception is
the sum over ten subtasks, cognition over four. An answer is read by the authors' rule: "yes", or else "no", within its
first four characters, in lower case; anything else is neither, and wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distilvlm.data.problems import DataError, RowError
from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.questions import Asked, Question
from distilvlm.evaluate.suites.groups import all_right, together
from distilvlm.evaluate.suites.suite import PICTURES, SHORT, Sources, gathered

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

PROMPT = SHORT
"""LLaVA-1.5's, in which {question} goes without the "Please answer yes or no." that {published} ends with."""

YES_OR_NO = "Please answer yes or no."


def said(prediction: str) -> str:
    start = prediction.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def judge(question: Question, prediction: str) -> Mapping[str, Any]:
    found = said(prediction)
    right = found == question.answer
    verdict = "neither" if found == "other" else "right" if right else "wrong"
    return {**question.meta, "said": found, "right": right, "verdict": verdict}


def _columns(tasks: Sequence[str]) -> Any:
    """Of every subtask: right answers, answers, pictures with both right, pictures."""

    def parts(one: Answered) -> tuple[float, ...]:
        counts = (one.details["right"], 1, *all_right(one))
        return tuple(count * (one.details["subtask"] == task) for task in tasks for count in counts)

    return parts


def total(sums: np.ndarray) -> np.ndarray:
    """The score of the subtasks that were asked, [m] of [m, subtasks * 4]."""
    right, asked, both, pictures = np.moveaxis(sums.reshape(len(sums), -1, 4), 2, 0)  # [m, subtasks] each
    there = (asked > 0) & (pictures > 0)
    shares = [np.divide(a, b, out=np.zeros_like(a), where=there) for a, b in ((right, asked), (both, pictures))]
    return np.where(there.any(axis=1), 100 * (shares[0] + shares[1]).sum(axis=1), np.nan)


def _score(name: str, tasks: Sequence[str], about: str, headline: bool = True) -> Figure:
    title = name.replace("_", " ")
    return Figure(name, title, _columns(tasks), about=about, percent=False, headline=headline, combined=total)


MEASURE = Measure(
    "mme",
    (
        _score(
            "perception", PERCEPTION, "Sum of ten subtasks' accuracy and accuracy+, each from 0 to 100: 2000 at most."
        ),
        _score("cognition", COGNITION, "The same of four subtasks: 800 at most."),
        Figure("accuracy", "accuracy", lambda one: (one.details["right"], 1), about="Right answers of all."),
        Figure("accuracy_plus", "accuracy+", all_right, about="Pictures with both answers right."),
        Figure(
            "neither",
            "neither yes nor no",
            lambda one: (one.details["said"] == "other", 1),
            better="lower",
            about="They are wrong.",
            headline=False,
        ),
        *(_score(task, (task,), "Accuracy and accuracy+, 200 at most.", False) for task in (*PERCEPTION, *COGNITION)),
    ),
    judge,
    settle=together,
)


def read(where: Sources) -> Asked:
    """A directory per subtask: the pictures, and for each a text file of two lines, question, tab, Yes or No; both in
    it, or in images/ and questions_answers_YN/. What is there of the fourteen is asked."""
    root = where.root / "MME_Benchmark_release_version"
    root = root if root.is_dir() else where.root
    tasks = [name for name in (*PERCEPTION, *COGNITION) if (root / name).is_dir()]
    if not tasks:
        raise DataError(f"{root} has no directory of a subtask (existence, count, ...): see docs/suites.md")

    def questions(number: int, row: Mapping[str, Any]) -> Iterator[Question]:
        file: Path = row["file"]
        folder = file.parent if file.parent.name != "questions_answers_YN" else file.parents[1] / "images"
        names = [f"{folder.relative_to(where.root)}/{file.stem}{suffix}" for suffix in PICTURES]
        picture = where.picture(*names)
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if len(lines) != 2:
            raise RowError("row", f"{file.name} has {len(lines)} questions, two about every picture are expected")
        for turn, line in enumerate(lines):
            published, _, answer = (part.strip() for part in line.rpartition("\t"))
            if answer.lower() not in ("yes", "no"):
                raise RowError("answer", f"{file.name}, line {turn + 1}: {answer!r} is neither Yes nor No")
            asked = where.asked(question=published.removesuffix(YES_OR_NO).strip(), published=published)
            meta = {"subtask": row["task"], "group": f"{row['task']}/{file.stem}"}
            yield Question.of((file, number), meta["group"], (picture,), asked, answer.lower(), meta, turn)

    texts = ({"task": task, "file": file} for task in tasks for file in _texts(root / task))
    return gathered(root, enumerate(texts), questions)


def _texts(folder: Path) -> list[Path]:
    apart = folder / "questions_answers_YN"
    return sorted((apart if apart.is_dir() else folder).glob("*.txt"))
