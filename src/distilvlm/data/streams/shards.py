"""Rows of many shards as one list: every shard is indexed once, by itself, and what is known of it is kept.

The index of a shard holds its rows as lines of text, in LLaVA's form, with pictures named by their address in the shard
(`storage.inside`). Whatever the shards are, rows are then read as those of a JSONL file, and pictures at their places.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from distilvlm.data.parallel import mapped
from distilvlm.data.problems import DataError
from distilvlm.data.streams.json_rows import MalformedRow
from distilvlm.data.streams.stored import Stored, decoded
from distilvlm.storage import Kept, Reader, found, is_remote, keep, stand


@dataclass(frozen=True)
class Entry:
    """A row of a shard, or why there is none."""

    place: str  # in the shard, for people
    row: dict[str, Any] | None
    block: int = 0  # of the shard: what is read together
    field: str = "row"
    reason: str = ""


Index = Callable[[str], Iterator[Entry]]
"""Name of a shard to its rows. Raises DataError where it is none at all."""


class Shards(Stored):
    """The rows of shards, in the order of these.

    Args:
        names: files of this machine or of a store.
        index: what reads such a shard.
        form: a name for `index`, which changes with what it gives.

    Raises:
        DataError: a shard can't be opened, or is none.
    """

    def __init__(self, names: Sequence[str], index: Index, form: str) -> None:
        self.files = tuple(names)
        indexing = _Indexing(index, form)
        missing = [name for name in self.files if not indexing.is_kept(name)]
        for _ in mapped(indexing.only, missing):
            pass
        kept = [indexing(name) for name in self.files]
        self._parts = [_Part(Reader(one.text), one.arrays["bounds"], one.arrays["blocks"]) for one in kept]
        self._starts = np.cumsum([0, *(len(part.bounds) - 1 for part in self._parts)])
        stands = [[name, *one.about["stand"]] for name, one in zip(names, kept, strict=True)]
        self._content = hashlib.sha256(json.dumps(stands).encode()).hexdigest()
        self._blocks = np.cumsum([0, *(int(part.groups.max(initial=0)) + 1 for part in self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def content(self) -> str:
        return self._content

    def __getitem__(self, row: int) -> Any:
        part, own = self._of(row)
        return _value(part[own])[1]

    def stretch(self, start: int, stop: int) -> Iterator[Any]:
        while start < stop:
            part, own = self._of(start)
            end = min(stop - start + own, len(part))
            yield from (_value(entry)[1] for entry in part.stretch(own, end))
            start += end - own

    def file_of(self, row: int) -> str:
        number = self._number(row)
        part, own = self._of(row)
        return f"{self.files[number]}#{_value(part[own])[0]}"

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        found = self._blocks[numbers]
        for number in np.unique(numbers):
            own = numbers == number
            found[own] += self._parts[number].groups[rows[own] - self._starts[number]]
        return found

    def _number(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _of(self, row: int) -> tuple[_Part, int]:
        number = self._number(row)
        return self._parts[number], row - int(self._starts[number])


class _Part(Stored):
    """What is kept of one shard."""

    def __init__(self, reader: Reader, bounds: np.ndarray, groups: np.ndarray) -> None:
        self.reader, self.bounds, self.groups = reader, bounds, groups

    def value(self, row: int, text: bytes) -> Any:
        return decoded(text)


def _value(entry: list[Any]) -> tuple[str, Any]:
    place, row, *problem = entry
    return place, row if row is not None else MalformedRow(problem[1], problem[0])


@dataclass(frozen=True)
class _Indexing:
    """Indexes a shard, unless that was done; loader processes can be handed it."""

    index: Index
    form: str

    def is_kept(self, name: str) -> bool:
        return found(*self._of(name)) is not None

    def only(self, name: str) -> None:
        """Index it, and give nothing back."""
        self(name)

    def _of(self, name: str) -> tuple[Any, list[Any]]:
        """What is kept, and of which state."""
        try:
            return [self.form, name if is_remote(name) else str(Path(name).absolute())], stand(name)
        except FileNotFoundError:
            raise DataError(f"no shard {name}") from None
        except (OSError, ModuleNotFoundError, ValueError) as error:
            raise DataError(f"{name} can't be opened: {error}") from None

    def __call__(self, name: str) -> Kept:
        what, at = self._of(name)

        def make(text: BinaryIO) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            bounds, blocks = [0], []
            for entry in self.index(name):
                problem = [] if entry.row is not None else [entry.field, entry.reason]
                line = json.dumps([entry.place, entry.row, *problem], default=str).encode() + b"\n"
                bounds.append(bounds[-1] + text.write(line))
                blocks.append(entry.block)
            return {"bounds": np.array(bounds), "blocks": np.array(blocks, np.int32)}, {"stand": at}

        return keep(what, at, make)
