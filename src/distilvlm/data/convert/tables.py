"""Rows of a table with named columns (parquet, Hugging Face `datasets`, JSON) → conversations with pictures."""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from distilvlm.data.convert.items import IMAGE_TOKEN, Fault, Item, Turn, asked, filled
from distilvlm.data.convert.talk import FIELDS as TALK_FIELDS
from distilvlm.data.convert.talk import turns
from distilvlm.data.convert.vqa import ANSWER_FIELDS, ID_FIELDS, IMAGE_FIELDS, QUESTION_FIELDS, answer_text, plain_text
from distilvlm.data.problems import DataError

PICTURE_COLUMNS = (*IMAGE_FIELDS, "images", "picture", "img", "jpg", "png")
ANSWER_COLUMNS = (*ANSWER_FIELDS, "caption", "text")
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}


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
        image = self._one("image", self.image_field, PICTURE_COLUMNS, names, source, needed=False)
        asks = self.question_field or self.answer_field or self.question != "{question}"
        usual = () if asks else TALK_FIELDS
        talk = self._one("conversation", self.conversation_field, usual, names, source, needed=False)
        if talk is not None:
            return Columns(image, talk, None, None, self.question, self.answer)
        question = None
        if "{question}" in self.question:
            question = self._one("question", self.question_field, QUESTION_FIELDS, names, source)
        rest = [name for name in names if name not in (image, question)]
        answer = self._one("answer", self.answer_field, ANSWER_COLUMNS, rest, source)
        return Columns(image, None, question, answer, self.question, self.answer)

    def _one(
        self,
        what: str,
        given: str | None,
        usual: Sequence[str],
        names: Sequence[str],
        source: Path,
        needed: bool = True,
    ) -> str | None:
        found = next((name for name in ([given] if given else usual) if name in names), None)
        if found is None and (needed or given):
            wanted = f"no column '{given}'" if given else f"no column for the {what} ({', '.join(usual)})"
            more = ' or give question="..." to ask the same of all' if what == "question" else ""
            raise DataError(f"{source}: {wanted}; it has {', '.join(names)}. Set {what}_field{more}")
        return found


@dataclass
class Store:
    """A directory of pictures named by their content, each once. Bytes are written as they came."""

    directory: Path
    _known: dict[str, str] = field(default_factory=dict)

    def keep(self, content: bytes) -> str:
        """Write a picture unless it is there; returns its file name.

        Raises:
            ValueError: the bytes are no picture.
        """
        digest = hashlib.sha256(content).hexdigest()[:32]
        if digest not in self._known:
            path = self.directory / f"{digest}{_suffix(content)}"
            if not path.is_file() or path.stat().st_size != len(content):
                self.directory.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".partial-{uuid.uuid4().hex[:12]}")
                partial.write_bytes(content)
                partial.replace(path)
            self._known[digest] = path.name
        return self._known[digest]


def _suffix(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = image.format or ""
    except Exception:  # broken headers surface as anything
        raise ValueError(f"its {len(content)} bytes are no picture: put a picture file's bytes there") from None
    return SUFFIXES.get(kind, f".{kind.lower()}")


Row = tuple[str, int, Any]
"""(file, 0-based row of it, the row)."""


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
    for file, number, row in rows:
        if not isinstance(row, Mapping):
            yield Fault(file, number, "row", getattr(row, "reason", "is no object with fields"))
            continue
        try:
            yield _item(file, number, _named(row, labels or {}), columns, store)
        except ValueError as error:
            if len(error.args) != 2:
                raise
            place, reason = error.args
            yield Fault(file, number, place, reason)


def _item(file: str, number: int, row: Mapping[str, Any], columns: Columns, store: Store | None) -> Item:
    kept = row.get("meta")  # of a row that this package has written
    kept = kept if isinstance(kept, Mapping) else {}
    scalars = {**kept, **{key: value for key, value in row.items() if isinstance(value, (str, int, float, bool))}}
    used = {columns.image_field, columns.conversation_field, columns.question_field, columns.answer_field, *ID_FIELDS}
    meta = {key: value for key, value in scalars.items() if key not in used}
    identity = next((str(row[key]) for key in ID_FIELDS if row.get(key) is not None), str(number))
    place = columns.image_field or "image"
    images = _images(row.get(place), place, store)
    if columns.conversation_field is None:
        return Item(file, number, identity, images, _asked(row, scalars, columns), scalars, meta, image_field=place)
    spoken, shown = turns(row.get(columns.conversation_field), columns.conversation_field)
    named = [picture for picture in shown if picture is not None]
    if named and (images or len(named) < len(shown)):
        raise ValueError(
            columns.conversation_field, f"names {len(named)} pictures itself, but not all: write all of one kind"
        )
    if shown and not named and not images:
        raise ValueError(columns.conversation_field, f"shows {len(shown)} pictures, but '{place}' holds none")
    images = images or _images(named, columns.conversation_field, store)
    marked = any(IMAGE_TOKEN in turn.text for turn in spoken)
    return Item(file, number, identity, images, spoken, scalars, meta, marked, place)


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


def _images(value: Any, place: str, store: Store | None) -> tuple[str, ...]:
    several = value if isinstance(value, list) else [value]
    return tuple(_image(entry, place, store) for entry in several if entry is not None)


def _image(value: Any, place: str, store: Store | None) -> str:
    """The name of a picture given as a path, as bytes or as {"bytes", "path"} (`datasets`' Image)."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, (bytes, bytearray)) or store is None:
        raise ValueError(place, f"is {type(value).__name__}, neither the path nor the bytes of a picture file")
    try:
        return store.keep(bytes(value))
    except ValueError as error:
        raise ValueError(place, str(error)) from None


def _named(row: Mapping[str, Any], labels: Mapping[str, Sequence[str]]) -> Mapping[str, Any]:
    named = dict(row)
    for column, names in labels.items():
        value = row.get(column)
        if isinstance(value, int) and 0 <= value < len(names):
            named[column] = names[value]
        elif isinstance(value, int):
            named[column] = None  # `datasets` writes -1 where a label is not known
    return named
