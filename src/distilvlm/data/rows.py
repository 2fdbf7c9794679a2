"""Rows of a file, one at a time, with the place of whatever is malformed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distilvlm.data.streams import MalformedRow, open_rows

__all__ = ["MalformedRow", "rows"]


def rows(path: Path | str) -> Iterator[Any]:
    """The rows of a `.json` list or a `.jsonl` file (told apart by the first character), or of shards, in order.

    Raises:
        DataError: no such file, not UTF-8, neither a list nor JSONL, or a malformed list (names file and line).
    """
    found = open_rows(str(path))
    yield from found.stretch(0, len(found))
