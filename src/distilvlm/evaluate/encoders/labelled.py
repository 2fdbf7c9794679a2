"""Labelled pictures: one question each, whose answer is the class. Folders of classes, or rows of a data file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distilvlm.data import DataError, Record, SampleKey, Turn, raise_or_quarantine, read
from distilvlm.data.convert.folders import read as read_folders
from distilvlm.data.convert.items import Fault
from distilvlm.data.records import PICTURE
from distilvlm.evaluate.questions import Asked, Question, asked_of
from distilvlm.recipe import SourceSpec

QUESTION = "Which class?"
"""What a folder asks of each of its pictures."""


def labelled(path: str | Path, images: str | Path | None = None) -> Asked:
    """The pictures of ROOT/CLASS/picture.jpg, or of a data file whose every row has one picture and its class as the
    answer.

    Args:
        images: directory that a file's picture paths are relative to; default: the file's.

    Raises:
        DataError: nothing labelled is there, or a row has no picture, several, or several answers.
    """
    path = Path(path)
    if path.is_dir():
        return Asked(str(path), tuple(_of_folders(path)))
    asked = asked_of(read(SourceSpec(path=str(path), images=None if images is None else str(images)), "pictures"))
    raise_or_quarantine(asked.bad, "fatal")
    seen: set[int] = set()
    for question in asked.questions:
        key, shown = question.record.key, len(question.record.images)
        if shown != 1 or key.row in seen:
            what = f"{shown} pictures" if shown != 1 else "several answers"
            raise DataError(f"{key.file}, row {key.row} has {what}: one picture with its class as the answer is needed")
        seen.add(key.row)
    if not asked.questions:
        raise DataError(f"{path} holds no picture with an answer: rows whose answer is the picture's class are needed")
    return asked


def taken(asked: Asked, count: int | None) -> Asked:
    """`count` of the pictures, or all: of every class as many as of the others, spread evenly over what it has. Classes
    that have fewer give all, and the rest goes to the others."""
    if count is None or count >= len(asked.questions):
        return asked
    members: dict[str, list[int]] = {}
    for place, question in enumerate(asked.questions):
        members.setdefault(question.answer, []).append(place)
    chosen: list[int] = []
    left = count
    for number, places in enumerate(sorted(members.values(), key=len)):
        share = min(len(places), left // (len(members) - number))
        chosen += [places[index * len(places) // share] for index in range(share)]
        left -= share
    return Asked(asked.name, tuple(asked.questions[place] for place in sorted(chosen)), asked.bad)


def classes(asked: Asked) -> list[str]:
    """The classes, in alphabetical order."""
    return sorted({question.answer for question in asked.questions})


def pictures(asked: Asked) -> list[str]:
    """The picture file of each question."""
    return [question.record.images[0] for question in asked.questions]


def _of_folders(root: Path) -> Iterator[Question]:
    reading = read_folders(root)
    for row, item in enumerate(reading.items):
        if isinstance(item, Fault):
            raise DataError(str(item))
        turns = (Turn("user", f"{PICTURE}\n{QUESTION}"), Turn("assistant", str(item.meta["class"])))
        shown = tuple(str(reading.images / name) for name in item.images)
        yield Question(Record(SampleKey("pictures", str(root), row), item.id, shown, turns), 0, item.meta)
