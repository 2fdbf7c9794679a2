"""A record: pictures and the turns of a conversation, whatever file format it came from."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from distilvlm.data.batch import SampleKey

PICTURE = "\ue000"
"""Stands in `Turn.text` where a picture goes. Private use, so that no typed text can be mistaken for it."""

RESERVED = "\ue000\ue001\ue002"
"""Private-use characters that this package puts into text: the picture, and the template's two marks."""

IMAGE_TOKEN = "<image>"
"""LLaVA's marker in data files, and the special token of every tokenizer that a VLM of ours holds."""

Role = Literal["system", "user", "assistant"]

Preferences = Literal["pairs", "rated"]
"""What records of preferences are: pairs of a chosen and a rejected answer, or single answers that were rated."""


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str  # PICTURE marks the place of a picture


@dataclass(frozen=True, slots=True)
class Record:
    """Pictures and a conversation about them. One of preferences ends with the answer that was chosen, or rated; what
    stands before it is the prompt."""

    key: SampleKey
    id: str  # as the file names it; the row number where it doesn't
    images: tuple[str, ...]  # paths, in the order of the PICTURE characters
    turns: tuple[Turn, ...]
    other: tuple[Turn, ...] = ()  # of a pair: the same prompt with the rejected answer
    desirable: bool | None = None  # of a rated answer: whether it is a good one

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(turn.text for turn in self.turns if turn.role == "assistant")

    @property
    def preferences(self) -> Preferences | None:
        if self.other:
            return "pairs"
        return None if self.desirable is None else "rated"

    def rejected(self) -> Record:
        """A pair's other side, as a record."""
        return replace(self, turns=self.other)

    def answered(self, text: str) -> Record:
        """The same prompt with `text` for its last answer."""
        return replace(self, turns=(*self.turns[:-1], Turn("assistant", text)))


class Records(Sequence[Record]):
    """The records of a source, each made when it is asked for, and numbers of all of them as arrays.

    Records as Python objects would take gigabytes, and again as many in every loader process, because counting
    references dirties shared pages.

    Attributes:
        source: its name in the recipe.
        file: what it is read from.
        root: the directory that pictures' names are relative to.
    """

    source: str
    file: str
    root: Path

    @property
    def rows(self) -> np.ndarray:
        """[records] int64: row of the source that each was."""
        raise NotImplementedError

    @property
    def words(self) -> np.ndarray:
        """[records] words of all turns, see `turns.Draft.words`."""
        raise NotImplementedError

    @property
    def pictures(self) -> np.ndarray:
        """[records] pictures per record."""
        raise NotImplementedError

    @property
    def blocks(self) -> np.ndarray:
        """[records] number of what each lies in: records of one block are read together at little more than the cost of
        one."""
        return self.rows // 4096

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def place(self, index: int) -> int:
        """`index` from the front. Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return index % len(self)


class Packed(Records):
    """Records packed into one buffer, for what no file of rows tells."""

    def __init__(self, source: str, file: str, root: Path) -> None:
        self.source = source
        self.file = file
        self.root = root
        self._buffer = bytearray()
        self._ends = array("q")
        self._rows = array("q")
        self._pictures = array("i")

    def append(self, row: int, id: str, images: Sequence[str]) -> None:
        """Add a record of pictures without text."""
        self._buffer += json.dumps([id, list(images)]).encode()
        self._ends.append(len(self._buffer))
        self._rows.append(row)
        self._pictures.append(len(images))

    @property
    def rows(self) -> np.ndarray:
        return np.array(self._rows, dtype=np.int64)

    @property
    def words(self) -> np.ndarray:
        return np.zeros(len(self), np.int64)

    @property
    def pictures(self) -> np.ndarray:
        return np.array(self._pictures, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        index = self.place(index)
        start = self._ends[index - 1] if index else 0
        id, images = json.loads(self._buffer[start : self._ends[index]])
        key = SampleKey(self.source, self.file, self._rows[index])
        return Record(key=key, id=id, images=tuple(str(self.root / image) for image in images), turns=())
