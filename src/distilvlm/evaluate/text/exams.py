"""Exams as their authors publish and ask them: MMLU and C-Eval, a CSV file per subject, with solved examples.

The prompts are those of the authors' own scripts (hendrycks/test; hkust-nlp/ceval, answers only), character by
character: MMLU's two spaces before a subject are theirs. The model is asked for the letter.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distilvlm.data.problems import DataError
from distilvlm.evaluate.text.choices import Choice

LETTERS = "ABCD"
SPLITS = ("dev", "val", "test")


@dataclass(frozen=True)
class Solved:
    """One question of an exam."""

    question: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Form:
    """How an exam is written."""

    head: str  # with {subject}
    answer: str  # in front of the answer's letter
    space: str  # between that and the letter

    def asked(self, one: Solved) -> str:
        options = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, one.options, strict=False))
        return f"{one.question}{options}\n{self.answer}"

    def example(self, one: Solved) -> str:
        return f"{self.asked(one)}{self.space}{LETTERS[one.right]}\n\n"


MMLU = Form("The following are multiple choice questions (with answers) about {subject}.\n\n", "Answer:", " ")
CEVAL = Form("以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n", "答案：", "")


def exam(
    form: Form, task: str, subject: tuple[str, str], file: Path, questions: Sequence[Solved], examples: Sequence[Solved]
) -> Iterator[Choice]:
    """The questions of one subject (its name, and how the prompt says it) behind its solved examples."""
    for row, one in enumerate(questions):
        asked = form.asked(one)
        letters = LETTERS[: len(one.options)]
        yield Choice.of(
            (file, row),
            task,
            asked,
            letters,
            one.right,
            [(asked, form.space + letter) for letter in letters],
            form.head.format(subject=subject[1]),
            [form.example(example) for example in examples],
            subject[0],
        )


def read_mmlu(directory: str | Path, split: str = "test", shots: int = 5, subjects: Sequence[str] = ()) -> list[Choice]:
    """MMLU as published (data.tar): DIR/dev/SUBJECT_dev.csv, DIR/test/SUBJECT_test.csv, without a header: question, A,
    B, C, D, answer. DIR may also be the directory above, which holds `data`.

    Args:
        split: test or val.
        shots: examples before each question, from dev; 5 are the authors'.
        subjects: only these; default: all.

    Raises:
        DataError: a file is not there, or a row is none; names file and row.
    """
    return _read(Path(directory), "mmlu", split, shots, subjects)


def read_ceval(directory: str | Path, split: str = "val", shots: int = 5, subjects: Sequence[str] = ()) -> list[Choice]:
    """C-Eval as published (ceval-exam.zip): DIR/dev/SUBJECT_dev.csv and DIR/val/SUBJECT_val.csv with a header: id,
    question, A, B, C, D, answer and, in dev, explanation. The test files hold no answers: those are only known to the
    authors' server.

    Subjects have their Chinese names where the authors' subject_mapping.json lies in DIR, or else their files' names.

    Args:
        split, shots, subjects: as of `read_mmlu`.

    Raises:
        DataError: as `read_mmlu`, or a split without answers.
    """
    return _read(Path(directory), "ceval", split, shots, subjects)


def _read(
    directory: Path, kind: Literal["mmlu", "ceval"], split: str, shots: int, subjects: Sequence[str]
) -> list[Choice]:
    root = directory / "data" if (directory / "data" / split).is_dir() else directory
    if split not in SPLITS or not (root / split).is_dir():
        raise DataError(f"no directory {root / split}: name the one that holds dev, val and test (split: {split})")
    if shots < 0:
        raise DataError(f"shots: {shots} is no number of examples")
    there = sorted(path.name.removesuffix(f"_{split}.csv") for path in (root / split).glob(f"*_{split}.csv"))
    unknown = sorted(set(subjects) - {*there})
    if unknown or not there:
        raise DataError(
            f"{root / split} has no {unknown[0] if unknown else 'SUBJECT'}_{split}.csv; there are {', '.join(there)}"
        )
    names = _chinese(root) if kind == "ceval" else {}
    found: list[Choice] = []
    for subject in subjects or there:
        file, examples = root / split / f"{subject}_{split}.csv", root / "dev" / f"{subject}_dev.csv"
        solved = _solved(examples, kind) if shots else []
        if len(solved) < shots:
            raise DataError(f"{examples} has {len(solved)} examples, {shots} are asked for: lower shots")
        form, words = (MMLU, spoken(subject)) if kind == "mmlu" else (CEVAL, names.get(subject, subject))
        found += exam(form, kind, (subject, words), file, _solved(file, kind), solved[:shots])
    return found


def spoken(subject: str) -> str:
    """A subject as MMLU's script writes it: a space before every word, the first one, too."""
    return "".join(f" {word}" for word in subject.split("_"))


def _solved(file: Path, kind: Literal["mmlu", "ceval"]) -> list[Solved]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} can't be read as CSV: {error}") from None
    header = ["question", *LETTERS, "answer"]
    if kind == "ceval":
        header = rows[0] if rows else []
        if missing := [name for name in ("question", *LETTERS) if name not in header]:
            raise DataError(f"{file}: its first line has no column {missing[0]}: {', '.join(header)}")
        if "answer" not in header:
            raise DataError(f"{file} holds no answers, as the authors publish it: take the split val")
        rows = rows[1:]
    found: list[Solved] = []
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{file}, row {number}: {len(row)} columns, {len(header)} are expected")
        told: Mapping[str, Any] = dict(zip(header, row, strict=True))
        answer = told["answer"].strip()
        if len(answer) != 1 or answer not in LETTERS:
            raise DataError(f"{file}, row {number}: the answer is {told['answer']!r}, not one of A, B, C and D")
        found.append(Solved(told["question"], tuple(told[letter] for letter in LETTERS), LETTERS.index(answer)))
    return found


def _chinese(root: Path) -> dict[str, str]:
    file = root / "subject_mapping.json"
    if not file.is_file():
        return {}
    try:
        return {key: names[1] for key, names in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise DataError(f"{file} can't be read as C-Eval's names of subjects: {error}") from None
