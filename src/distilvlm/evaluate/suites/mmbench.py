"""MMBench (Liu et al. 2023): a question counts if it is answered rightly however its options are rotated.

Rows are the authors' TSV with the pictures in base64. Newer files hold the rotations as rows of their own (`index` of a
million and more, the picture given by the first row's index); of older ones they are made: of n options n rotations,
the letters staying in their order.
"""

from __future__ import annotations

import base64
import csv
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilvlm.data.convert.embedded import Store
from distilvlm.data.problems import DataError, RowError
from distilvlm.evaluate.measures import Figure
from distilvlm.evaluate.questions import Asked, Question
from distilvlm.evaluate.suites.choices import LETTERS, UNREADABLE, by_letter_or_text, choice, lettered, lines
from distilvlm.evaluate.suites.groups import all_right, first_right, together
from distilvlm.evaluate.suites.suite import Sources, field_of, gathered

PROMPT = "{hint}\n{question}\n{options}\nAnswer with the option's letter from the given choices directly."
"""LLaVA-1.5's; {hint} is nothing where there is none."""

PROMPT_CN = "{hint}\n{question}\n{options}\n请直接回答选项字母。"

COPIES = 1_000_000
"""From this `index` on, rows are rotations: of the row whose index is the remainder."""

EMPTY = ("", "nan", "none")

MEASURE = replace(
    choice(by_letter_or_text, "mmbench", (), lambda question: {k: question.meta[k] for k in ("group", "category")}),
    figures=(
        Figure("circular", "circular", all_right, about="Questions that are right in every rotation of their options."),
        Figure("vanilla", "vanilla", first_right, about="Questions that are right as they are published."),
        UNREADABLE,
    ),
    settle=together,
)


def read(where: Sources) -> Asked:
    """mmbench_{split}*.tsv or MMBench_{SPLIT}*.tsv; what it embeds goes to pictures/ beside it."""
    file = where.file(
        "questions",
        *(f"mmbench_{where.split}{end}.tsv" for end in ("_[0-9]*", "")),
        *(f"MMBench_{where.split.upper()}{end}.tsv" for end in ("", "_EN", "*")),
    )
    store = Store(where.root / where.given.get("pictures", "pictures"))
    table = list(_rows(file))
    copied = {_number(row) % COPIES for row in table if _number(row) >= COPIES}
    pictures: dict[int, str] = {}
    seen: dict[int, int] = {}

    def picture(row: Mapping[str, Any]) -> str:
        given = field_of(row, "image")
        if given.isdigit() and len(given) < 64:  # another row's
            if int(given) not in pictures:
                raise RowError("image", f"is that of row {given}, which does not come before")
            return pictures[int(given)]
        try:
            return str(store.directory / store.keep(base64.b64decode(given)))
        except ValueError as error:
            raise RowError("image", str(error)) from None

    def questions(number: int, row: Mapping[str, Any]) -> Iterator[Question]:
        if not str(field_of(row, "index")).isdigit():
            raise RowError("index", f"is {row['index']!r}, no number")
        index = _number(row)
        pictures[index] = shown = picture(row)
        options = [row[letter] for letter in LETTERS[:4] if not _empty(row.get(letter))]
        answer = field_of(row, "answer")
        if answer not in LETTERS[: len(options)]:
            raise RowError(
                "answer", f"is {answer!r}, no letter of the {len(options)} options: take a split with answers"
            )
        whole = index % COPIES
        for rotation in range(1 if whole in copied else len(options)):
            rotated = lettered(options[rotation:] + options[:rotation])
            letter = LETTERS[(LETTERS.index(answer) - rotation) % len(options)]
            hint = "" if _empty(row.get("hint")) else row["hint"]
            asked = where.asked(hint=hint, question=field_of(row, "question"), options=lines(rotated))
            meta = {"options": rotated, "group": whole, "category": row.get("l2-category") or row.get("category")}
            turn = seen[whole] = seen.get(whole, -1) + 1
            yield Question.of((file, number), str(index), (shown,), asked, letter, meta, turn)

    return gathered(file, enumerate(table), questions)


def _rows(file: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            yield from csv.DictReader(stream, delimiter="\t")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} can't be read as a table: {error}") from None


def _number(row: Mapping[str, str]) -> int:
    given = row.get("index") or ""
    return int(given) if given.isdigit() else 0


def _empty(value: str | None) -> bool:
    return value is None or value.strip().lower() in EMPTY
