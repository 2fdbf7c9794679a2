"""Rows of a table with named columns (parquet, Hugging Face `datasets`, JSON) → conversations with pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilvlm.data.convert.embedded import Store, pictures, shown_pictures
from distilvlm.data.convert.items import IMAGE_TOKEN, Fault, Item, Turn, asked, filled
from distilvlm.data.convert.talk import FIELDS as TALK_FIELDS
from distilvlm.data.convert.talk import turns
from distilvlm.data.convert.vqa import ANSWER_FIELDS, ID_FIELDS, IMAGE_FIELDS, QUESTION_FIELDS, answer_text, plain_text
from distilvlm.data.problems import DataError

PICTURE_COLUMNS = (*IMAGE_FIELDS, "images", "picture", "img", "jpg", "png")
ANSWER_COLUMNS = (*ANSWER_FIELDS, "caption", "text")


INSTEAD = "distilvlm data convert preference"
"""The command for tables of preferences."""


@dataclass(frozen=True)
class Columns:
    """Which column is what; None is told from the names (see the constants above and in `talk`, `vqa`).

    Args:
        question, answer: templates with {question}, {answer} and every other column; a `question` without {question}
            needs no question column ("" for captions).
    """

    image_field: str | None = None
    conversation_field: str | None = None
    question_field: str | None = None
    answer_field: str | None = None
    question: str = "{question}"
    answer: str = "{answer}"

    def found(self, names: Sequence[str], source: Path) -> Columns:
        """With every name filled in.

        Raises:
            DataError: a named column is not there, or there is neither a conversation nor question and answer.
        """
        if {"chosen", "rejected"} <= set(names) and not (self.answer_field or self.conversation_field):
            raise DataError(
                f"{source} holds pairs of answers (chosen, rejected): {INSTEAD}; or name one in answer_field"
            )
        image = column("image", self.image_field, PICTURE_COLUMNS, names, source, needed=False)
        asks = self.question_field or self.answer_field or self.question != "{question}"
        usual = () if asks else TALK_FIELDS
        talk = column("conversation", self.conversation_field, usual, names, source, needed=False)
        if talk is not None:
            return Columns(image, talk, None, None, self.question, self.answer)
        question = None
        if "{question}" in self.question:
            question = column("question", self.question_field, QUESTION_FIELDS, names, source)
        rest = [name for name in names if name not in (image, question)]
        answer = column("answer", self.answer_field, ANSWER_COLUMNS, rest, source)
        return Columns(image, None, question, answer, self.question, self.answer)


def column(
    what: str, given: str | None, usual: Sequence[str], names: Sequence[str], source: Path, needed: bool = True
) -> str | None:
    """The column of `what`: the one `given`, or the first of the `usual` ones that is there.

    Raises:
        DataError: it is not there.
    """
    found = next((name for name in ([given] if given else usual) if name in names), None)
    if found is None and (needed or given):
        wanted = f"no column '{given}'" if given else f"no column for the {what} ({', '.join(usual)})"
        more = ' or give question="..." to ask the same of all' if what == "question" else ""
        raise DataError(f"{source}: {wanted}; it has {', '.join(names)}. Set {what}_field{more}")
    return found


Row = tuple[str, int, Any]
"""(file, 0-based row of it, the row)."""


@dataclass(frozen=True)
class Table:
    """Rows with named columns, whatever they lie in."""

    names: Sequence[str]
    rows: Iterable[Row]
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)  # column -> names of the classes it numbers


def items(
    rows: Iterable[Row],
    columns: Columns,
    store: Store | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Item | Fault]:
    """Rows as items.

    Args:
        columns: as `Columns.found` gave them.
        store: where embedded pictures go; without one pictures must be named by path.
        labels: column → names of its classes, where it holds their numbers (`datasets`' ClassLabel).
    """

    def item(file: str, number: int, row: Mapping[str, Any]) -> Item:
        return _item(file, number, named(row, labels or {}), columns, store)

    return made(rows, item)


def made(rows: Iterable[Row], item: Callable[[str, int, Mapping[str, Any]], Item]) -> Iterator[Item | Fault]:
    """What `item` makes of every row, or the fault that it raises: ValueError of place and reason."""
    for file, number, row in rows:
        if not isinstance(row, Mapping):
            yield Fault(file, number, "row", getattr(row, "reason", "is no object with fields"))
            continue
        try:
            yield item(file, number, row)
        except ValueError as error:
            if len(error.args) != 2:
                raise
            place, reason = error.args
            yield Fault(file, number, place, reason)


def kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says beside its conversation and picture: single values, and the `meta` of a row that this package
    has written."""
    meta = row.get("meta")
    scalars = {key: value for key, value in row.items() if isinstance(value, (str, int, float, bool))}
    return {**(meta if isinstance(meta, Mapping) else {}), **scalars}


def identity(row: Mapping[str, Any], number: int, fields: Sequence[str] = ID_FIELDS) -> str:
    return next((str(row[key]) for key in fields if row.get(key) is not None), str(number))


def _item(file: str, number: int, row: Mapping[str, Any], columns: Columns, store: Store | None) -> Item:
    scalars = kept(row)
    used = {columns.image_field, columns.conversation_field, columns.question_field, columns.answer_field, *ID_FIELDS}
    meta = {key: value for key, value in scalars.items() if key not in used}
    place = columns.image_field or "image"
    images = pictures(row.get(place), place, store)
    id = identity(row, number)
    if columns.conversation_field is None:
        return Item(file, number, id, images, _asked(row, scalars, columns), scalars, meta, image_field=place)
    spoken, shown = turns(row.get(columns.conversation_field), columns.conversation_field)
    images = shown_pictures(images, place, shown, columns.conversation_field, store)
    marked = any(IMAGE_TOKEN in turn.text for turn in spoken)
    return Item(file, number, id, images, spoken, scalars, meta, marked, place)


def _asked(row: Mapping[str, Any], scalars: Mapping[str, Any], columns: Columns) -> tuple[Turn, ...]:
    assert columns.answer_field is not None
    answer = answer_text(row.get(columns.answer_field))
    if not answer:
        raise ValueError(columns.answer_field, "is missing or empty: fill it in, or remove the row")
    values = {**scalars, "answer": answer}
    if columns.question_field is not None:
        values["question"] = plain_text(row.get(columns.question_field))
        if not values["question"]:
            raise ValueError(columns.question_field, "is missing or empty: fill it in, or remove the row")
    question = filled(columns.question, values, "question")
    return asked(question, filled(columns.answer, values, "answer"))


def named(row: Mapping[str, Any], labels: Mapping[str, Sequence[str]]) -> Mapping[str, Any]:
    """The row with names of classes in place of their numbers."""
    told = dict(row)
    for name, classes in labels.items():
        value = row.get(name)
        if isinstance(value, int) and 0 <= value < len(classes):
            told[name] = classes[value]
        elif isinstance(value, int):
            told[name] = None  # `datasets` writes -1 where a label is not known
    return told
