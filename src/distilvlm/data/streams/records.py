"""Records of rows that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distilvlm.data.batch import SampleKey
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.records import Record, Records
from distilvlm.data.streams.stored import Stored
from distilvlm.data.streams.survey import Survey
from distilvlm.data.turns import Draft
from distilvlm.storage import is_inside


class ReadRecords(Records):
    """The records of a source's rows.

    Args:
        source: its name in the recipe.
        file: its path there.
        stored: the rows.
        root: the directory that pictures' names are relative to.
        drafted: a row's value to what becomes the record; that it can be used is known.
        known: what a look at all rows has found.
    """

    def __init__(
        self, source: str, file: str, stored: Stored, root: Path, drafted: Callable[[Any], Draft], known: Survey
    ) -> None:
        self.source = source
        self.file = file
        self.root = root
        self.stored = stored
        self._drafted = drafted
        self._known = known
        self._last: tuple[int, Record] | None = None  # a sample asks for its record more than once

    @property
    def rows(self) -> np.ndarray:
        return self._known.rows

    @property
    def words(self) -> np.ndarray:
        return self._known.words

    @property
    def pictures(self) -> np.ndarray:
        return self._known.pictures

    @property
    def blocks(self) -> np.ndarray:
        return self.stored.blocks(self.rows)

    @property
    def shown(self) -> np.ndarray:
        """[pictures of all records, 2] uint64: a hash of each one's name."""
        return self._known.shown

    def __len__(self) -> int:
        return len(self._known.rows)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        index = self.place(index)
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        row = int(self.rows[index])
        record = self._record(row, self.stored[row])
        self._last = (index, record)
        return record

    def __iter__(self) -> Iterator[Record]:
        """All of them, read together."""
        index, total = 0, len(self)
        while index < total:
            stretch = self.rows[index : index + 1024]
            first, end = int(stretch[0]), int(stretch[-1]) + 1
            wanted = set(stretch.tolist())
            for row, value in zip(range(first, end), self.stored.stretch(first, end), strict=False):
                if row in wanted:
                    yield self._record(row, value)
            index += len(stretch)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}

    def _record(self, row: int, value: Any) -> Record:
        key = SampleKey(self.source, self.stored.file_of(row), row)
        try:
            draft = self._drafted(value)
        except RowError as error:
            raise DataError(f"{key.file}, row {row}, {error}: the file was changed while it is in use") from None
        given = value.get("id")
        return Record(
            key=key,
            id=str(row) if given is None else str(given),
            images=tuple(name if is_inside(name) else str(self.root / name) for name in draft.images),
            turns=tuple(draft.turns),
            other=tuple(draft.other),
            desirable=draft.desirable,
        )
