"""Parquet files as shards: columns are told from their names, as `distilvlm data convert` tells them, and embedded
pictures stay where they are."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distilvlm.data import geometry
from distilvlm.data.convert.arrow import AT_A_TIME, batches, labels, need_pyarrow, opened
from distilvlm.data.convert.columns import PICTURES, restored
from distilvlm.data.convert.embedded import Store
from distilvlm.data.convert.forms import named, renamed, to_llava
from distilvlm.data.convert.items import Fault
from distilvlm.data.convert.output import row as llava
from distilvlm.data.convert.tables import Columns, Row, items
from distilvlm.data.convert.tables import named as with_labels
from distilvlm.data.problems import RowError
from distilvlm.data.streams.shards import Entry
from distilvlm.storage import Reader, cell

FORM = "parquet 1"

ROWS = ("conversations", "messages", "chosen", "rejected", "completion")
"""Columns that are fields of a row as training reads it."""


def index(name: str) -> Iterator[Entry]:
    """The rows of a file, and what of them can't be used. Raises DataError."""
    need_pyarrow()
    import pyarrow.parquet as pq

    path = Path(name)
    with Reader(name).stream() as stream:
        file = opened(lambda: pq.ParquetFile(stream), path)
        schema, blocks = file.schema_arrow, _blocks(file)
        rows = batches(file.iter_batches(batch_size=AT_A_TIME), path)
        if any(column in ROWS for column in schema.names):
            for (_, number, told), block in zip(rows, blocks, strict=True):
                yield _entry(name, number, with_labels(told, labels(schema)), block)
            return
        columns = Columns().found(schema.names, path)
        there = _There(name, columns.image_field)
        made = items(there.watched(rows), columns, there, labels(schema))
        for number, (item, block) in enumerate(zip(made, blocks, strict=True)):
            place = f"row {number}"
            if isinstance(item, Fault):
                yield Entry(place, None, block, item.field, item.reason)
            else:
                yield Entry(place, llava(item), block)


def _blocks(file: Any) -> Iterator[int]:
    """The row group of every row."""
    for group in range(file.num_row_groups):
        for _ in range(file.metadata.row_group(group).num_rows):
            yield group


def _entry(name: str, number: int, told: Mapping[str, Any], block: int) -> Entry:
    """A row whose columns are its fields."""
    place = f"row {number}"
    try:
        row, held = restored(told)
        if "conversations" in row:
            row = to_llava(row)
        names = named(row)
        for order, ((column, position), content) in enumerate(zip(_places(told), held, strict=True)):
            if content is not None and order < len(names):
                if (problem := geometry.problem_of(io.BytesIO(content))) is not None:
                    raise RowError(column, problem)
                names[order] = cell(name, column, number, position)
        return Entry(place, renamed(row, names), block)
    except RowError as error:
        return Entry(place, None, block, error.field, error.reason)


def _places(told: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Column and position there of every picture, in the order in which `restored` gives them."""
    found: list[tuple[str, int]] = []
    for column in PICTURES:
        value = told.get(column)
        for position, one in enumerate(value if isinstance(value, list) else [value]):
            empty = all(value is None for value in one.values()) if isinstance(one, Mapping) else one is None
            if not empty:
                found.append((column, position))
    return found


class _There(Store):
    """Pictures of the row that is being read, which get their address instead of a place in a directory."""

    def __init__(self, file: str, column: str | None) -> None:
        super().__init__(Path())
        self.file, self.column = file, column
        self.row = 0
        self.shown: list[Any] = []

    def watched(self, rows: Iterator[Row]) -> Iterator[Row]:
        for file, number, row in rows:
            value = row.get(self.column)
            several = value if isinstance(value, list) else [value]
            self.row = number
            self.shown = [one.get("bytes") if isinstance(one, Mapping) else one for one in several]
            yield file, number, row

    def keep(self, content: bytes) -> str:
        if self.column is None or content not in self.shown:
            raise ValueError("stands in the conversation itself, where it can't be read alone: convert the file first")
        if (problem := geometry.problem_of(io.BytesIO(content))) is not None:
            raise ValueError(problem)
        return cell(self.file, self.column, self.row, self.shown.index(content))
