"""A suite of the user's own: a YAML file that says which files there are, how they are read, asked and measured.

    name: shelf
    reader: rows                 # LLaVA JSON or JSONL; or a published suite's name, for files of its form
    files: {questions: shelf.jsonl, pictures: photos}
    metric: choice               # default: the published suite's; of rows "accurate"
    prompt: "{question}\\n{options}\\nAnswer with the option's letter from the given choices directly."
    max_new_tokens: 8

Files are named from --data, which is by default the file's own directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from distilvlm.data import read as read_rows
from distilvlm.data.problems import DataError
from distilvlm.data.records import PICTURE
from distilvlm.evaluate.measures import Measure
from distilvlm.evaluate.questions import Asked, Question, asked_of
from distilvlm.evaluate.suites.catalogue import MEASURES, SUITES
from distilvlm.evaluate.suites.choices import lettered, lines
from distilvlm.evaluate.suites.suite import MeasureOf, Sources, Suite
from distilvlm.recipe import Section, SourceSpec, load_file
from distilvlm.recipe.errors import nearest

ROWS = "rows"


class SuiteFile(Section):
    """What a suite's file says."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9+._-]*$")
    reader: str = ROWS
    files: dict[str, str] = Field(default={}, description="role → file: questions, pictures, and the reader's own")
    metric: str | None = None
    prompt: str | None = None
    max_new_tokens: int | None = Field(default=None, gt=0)
    split: str | None = None

    @field_validator("reader")
    @classmethod
    def _is_reader(cls, value: str) -> str:
        if value != ROWS and value not in SUITES:
            raise ValueError(f"no reader of that name; {nearest(value, [ROWS, *SUITES])}")
        return value

    @field_validator("metric")
    @classmethod
    def _is_metric(cls, value: str | None) -> str | None:
        if value is not None and value not in MEASURES:
            raise ValueError(f"no metric of that name; {nearest(value, MEASURES)}")
        return value

    @property
    def suite(self) -> Suite:
        form = SUITES.get(self.reader) or Suite(ROWS, "", _rows, MEASURES["accurate"], "{question}", 64)
        return replace(
            form,
            name=self.name,
            title=self.name,
            measure=form.measure if self.metric is None else _tried(MEASURES[self.metric]),
            prompt=form.prompt if self.prompt is None else self.prompt,
            max_new_tokens=self.max_new_tokens or form.max_new_tokens,
            split=self.split or form.split,
        )


def own_suite(file: str | Path) -> tuple[Suite, dict[str, str]]:
    """A suite's file as a suite, and which file has which role.

    Raises:
        RecipeError: the file is wrong; says where, and the nearest known name.
    """
    told = load_file(file, SuiteFile)
    return told.suite, told.files


def _tried(chosen: MeasureOf) -> MeasureOf:
    """The measure, once it has judged every question's empty answer: what one lacks is told before a model is asked."""

    def measure(where: Sources, asked: Asked) -> Measure:
        found = chosen(where, asked)
        for one in asked.questions:
            try:
                found.judge(one, "")
            except KeyError as missing:
                raise DataError(f"{_place(one)}: metric {found.name} needs meta.{missing.args[0]}") from None
        return found

    return measure


def _rows(where: Sources) -> Asked:
    """Rows of LLaVA's or OpenAI's form. What their `meta` says is what metrics look for: `answers` of several people,
    `captions`, `options` (a list of texts, of which the answer is one, or its letter), `boxes` and `size`."""
    file = where.file("questions", "*.jsonl", "*.json")
    images = where.root / where.given.get("pictures", ".")
    asked = asked_of(read_rows(SourceSpec(path=str(file), images=str(images)), file.stem))
    return replace(asked, questions=tuple(_put(where, one) for one in asked.questions))


def _put(where: Sources, one: Question) -> Question:
    meta: dict[str, Any] = dict(one.meta)
    answer = one.answer
    if "options" in meta:
        meta["options"] = options = _lettered(one)
        answer = next((letter for letter, text in options.items() if text == answer), answer)
        if answer not in options:
            raise DataError(f"{_place(one)}: the answer {answer!r} is none of the options")
    turns = [turn for turn in one.record.turns if turn.role == "user"]
    text = "\n".join(turn.text for turn in turns)
    front = f"{PICTURE}\n" * len(one.record.images)
    marks, text = (front, text.removeprefix(front)) if text.startswith(front) else ("", text)
    shown = marks + where.asked(question=text, options=lines(meta.get("options", {})))
    record = replace(
        one.record,
        turns=(
            *(turn for turn in one.record.turns if turn.role == "system"),
            replace(turns[-1], text=shown),
            replace(one.record.turns[-1], text=answer),
        ),
    )
    return replace(one, record=record, meta=meta)


def _lettered(one: Question) -> dict[str, str]:
    options = one.meta["options"]
    if isinstance(options, Mapping):
        return {str(letter): str(text) for letter, text in options.items()}
    if not isinstance(options, list) or not options:
        raise DataError(f"{_place(one)}: meta.options is no list of texts")
    return lettered([str(text) for text in options])


def _place(one: Question) -> str:
    return f"{one.record.key.file}, row {one.record.key.row}"
