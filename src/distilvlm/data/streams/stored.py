"""What all rows that are read on demand have in common: places in a file of text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic_core import from_json

from distilvlm.storage import Reader

TOGETHER = 4 * 2**20
"""Bytes of rows that are read at once where they are read in order."""


class Stored:
    """Rows as places in text: row r is what stands in bytes bounds[r] ... bounds[r + 1] - 2 (a comma or a line break
    follows).

    Attributes:
        files: what the rows come from, for people.
    """

    files: tuple[str, ...]
    reader: Reader
    bounds: np.ndarray  # [rows + 1] int64

    @property
    def content(self) -> str:
        """A hash of what the rows are."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> Any:
        start, end = int(self.bounds[row]), int(self.bounds[row + 1]) - 1
        return self.value(row, self.reader.read(start, end - start))

    def stretch(self, start: int, stop: int) -> Iterator[Any]:
        """The rows `start` ... `stop` - 1, read together."""
        while start < stop:
            first = int(self.bounds[start])
            end = int(np.searchsorted(self.bounds, first + TOGETHER, side="right")) - 1
            end = min(stop, max(end, start + 1))
            text = self.reader.read(first, int(self.bounds[end]) - first)
            places = (self.bounds[start : end + 1] - first).tolist()
            for row, (begin, behind) in enumerate(pairwise(places), start):
                yield self.value(row, text[begin : behind - 1])
            start = end

    def value(self, row: int, text: bytes) -> Any:
        """The row that `text` is: any JSON value, or a `MalformedRow`. Raises DataError."""
        raise NotImplementedError

    def file_of(self, row: int) -> str:
        """The file that messages name for a row, and its place there where the row's number doesn't tell."""
        raise NotImplementedError

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        """[rows] what of the storage each row is in: rows of a block are read together at little more than the cost of
        one."""
        raise NotImplementedError


def decoded(text: bytes) -> Any:
    """What `json.loads` makes of a text, sooner. Raises as that does."""
    try:
        return from_json(text, cache_strings="keys")
    except ValueError:
        # It is malformed, or what only `json` reads: halves of surrogate pairs, hundreds of brackets within each other.
        return json.loads(text.decode("utf-8"))
