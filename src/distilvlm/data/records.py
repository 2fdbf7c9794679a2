"""A record: pictures and the turns of a conversation, whatever file format it came from."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distilvlm.data.batch import SampleKey

PICTURE = "\ue000"
"""Stands in `Turn.text` where a picture goes. Private use, so that no typed text can be mistaken for it."""

RESERVED = "\ue000\ue001\ue002"
"""Private-use characters that this package puts into text: the picture, and the template's two marks."""

IMAGE_TOKEN = "<image>"
"""LLaVA's marker in data files, and the special token of every tokenizer that a VLM of ours holds."""

Role = Literal["system", "user", "assistant"]
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")

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
    """Records packed into one buffer and made when asked for.

    665,000 conversations as Python objects take gigabytes, and again as many in every loader process, because counting
    references dirties shared pages. One buffer is shared as it is.
    """

    def __init__(self, source: str, file: str, root: Path) -> None:
        self.source = source
        self.file = file
        self.root = root
        self._buffer = bytearray()
        self._ends = array("q")
        self._rows = array("q")
        self._words = array("i")
        self._pictures = array("i")

    def append(
        self,
        row: int,
        id: str,
        images: Sequence[str],
        turns: Sequence[Turn],
        other: Sequence[Turn] = (),
        desirable: bool | None = None,
    ) -> None:
        packed = [id, list(images), _packed(turns)]
        if other or desirable is not None:
            packed += [_packed(other), desirable]
        self._buffer += json.dumps(packed).encode()
        self._ends.append(len(self._buffer))
        self._rows.append(row)
        self._words.append(max(sum(len(turn.text.split()) for turn in side) for side in (turns, other)))
        self._pictures.append(len(images))

    @property
    def rows(self) -> np.ndarray:
        """[records] row of the file that each was."""
        return np.array(self._rows, dtype=np.int64)

    @property
    def words(self) -> np.ndarray:
        """[records] words of all turns: LLaVA's measure of length for its grouped sampler. Of a pair, words of its
        longer side: both stand in one micro-batch, which is as long as its longest sequence."""
        return np.array(self._words, dtype=np.int64)

    @property
    def pictures(self) -> np.ndarray:
        """[records] pictures per record."""
        return np.array(self._pictures, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        id, images, turns, *preferences = json.loads(self._buffer[start : self._ends[index]])
        other, desirable = preferences or ((), None)
        return Record(
            key=SampleKey(self.source, self.file, self._rows[index]),
            id=id,
            images=tuple(str(self.root / image) for image in images),
            turns=_unpacked(turns),
            other=_unpacked(other),
            desirable=desirable,
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def _packed(turns: Sequence[Turn]) -> list[list[int | str]]:
    return [[_ROLES.index(turn.role), turn.text] for turn in turns]


def _unpacked(turns: Sequence[Sequence[Any]]) -> tuple[Turn, ...]:
    return tuple(Turn(_ROLES[role], text) for role, text in turns)
