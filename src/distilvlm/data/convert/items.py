"""What every format's reader gives: questions about pictures, and whatever could not become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilvlm.data.problems import DataError
from distilvlm.data.records import Preferences

IMAGE_TOKEN = "<image>"
"""LLaVA's marker of a picture's place in a question."""


@dataclass(frozen=True)
class Fault:
    """Something in the source that can't be used, where it is, and what to do."""

    file: str
    row: int | None  # 0-based row, line or object of the file; None where the file as a whole is meant
    field: str
    reason: str

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        return f"{self.file}{row}, field '{self.field}': {self.reason}"


@dataclass(frozen=True)
class Turn:
    speaker: str  # "human", "gpt" or "system"
    text: str


@dataclass(frozen=True)
class Item:
    """One question with its answer (or a whole conversation), about no, one or several pictures."""

    file: str  # where it comes from, for messages
    row: int | None
    id: str
    images: tuple[str, ...]  # relative to `Reading.images`
    turns: tuple[Turn, ...]
    fields: Mapping[str, Any]  # everything the source says of it: what `where` looks at
    meta: Mapping[str, Any]  # what of it is kept beside the conversation
    marked: bool = False  # whether the turns name the pictures' places themselves, as `<image>`
    image_field: str = "image"  # what the source calls the picture
    other: tuple[Turn, ...] = ()  # of a pair: the conversation with the rejected answer
    desirable: bool | None = None  # of a rated answer: whether it is a good one

    @property
    def preferences(self) -> Preferences | None:
        if self.other:
            return "pairs"
        return None if self.desirable is None else "rated"

    def fault(self, field: str, reason: str) -> Fault:
        return Fault(self.file, self.row, field, reason)


@dataclass
class Reading:
    """A source under way. `left_out` (reason → count) fills while `items` are taken."""

    images: Path  # the directory that pictures are named from
    items: Iterable[Item | Fault]
    left_out: Counter[str] = field(default_factory=Counter)
    rated: bool = False  # whether pairs are to be written as two rated answers each


def asked(question: str, answer: str) -> tuple[Turn, ...]:
    return (Turn("human", question), Turn("gpt", answer))


def filled(template: str, values: Mapping[str, Any], option: str) -> str:
    """`template` with its {names} replaced by `values`.

    Raises:
        DataError: a name that there is no value for, or braces that are none of ours.
    """
    try:
        return template.format_map(values)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        known = ", ".join(f"{{{name}}}" for name in values)
        raise DataError(
            f"{option} {template!r}: {type(error).__name__}: {error}; known are {known}; write {{{{ for a brace"
        ) from None
