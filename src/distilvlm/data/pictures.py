"""Pictures alone, of a directory or of any data file: what a stage learns from whose language model does not run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distilvlm.data.batch import IGNORED
from distilvlm.data.convert.pictures import is_picture
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.readers import Source, read
from distilvlm.data.records import Packed, Record, Records
from distilvlm.data.streams import shards_of
from distilvlm.data.streams.records import ReadRecords
from distilvlm.data.template import SAFE_ID, Encoded
from distilvlm.recipe.schema import SourceSpec

logger = logging.getLogger(__name__)


def read_pictures(spec: SourceSpec, name: str) -> Source:
    """The different pictures of a source, one record each: all below a directory, or all that a data file's rows show.

    Raises:
        DataError: as `readers.read`; no picture; or a directory with another number of them than the recipe says.
    """
    path = Path(spec.path)
    if path.is_dir() and not shards_of(spec.path):
        return _below(path, spec, name)
    rows = read(spec, name)
    assert isinstance(rows.records, ReadRecords)
    different = Different(rows.records)
    logger.info(
        "data '%s': %d different pictures of the %d that %d rows show; %d rows of text only are not looked at",
        *(name, len(different), len(rows.records.shown), len(rows.records), int((rows.records.pictures == 0).sum())),
    )
    return _filled(Source(name, spec, rows.format, different, rows.bad))


class Different(Records):
    """The different pictures of records, one record each, in the order in which they are shown first."""

    def __init__(self, records: ReadRecords) -> None:
        self.source, self.file, self.root = records.source, records.file, Path()
        self._records = records
        _, first = np.unique(records.shown, axis=0, return_index=True)
        first.sort()
        ends = np.cumsum(records.pictures)
        self._owners = np.searchsorted(ends, first, side="right")  # [pictures] the record that shows it first
        self._places = first - (ends - records.pictures)[self._owners]  # and its place among that one's pictures

    @property
    def rows(self) -> np.ndarray:
        return self._records.rows[self._owners]

    @property
    def words(self) -> np.ndarray:
        return np.zeros(len(self), np.int64)

    @property
    def pictures(self) -> np.ndarray:
        return np.ones(len(self), np.int64)

    @property
    def blocks(self) -> np.ndarray:
        return self._records.blocks[self._owners]

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        index = self.place(index)
        owner = self._records[int(self._owners[index])]
        return Record(owner.key, owner.id, (owner.images[int(self._places[index])],), ())


def _below(path: Path, spec: SourceSpec, name: str) -> Source:
    root = Path(spec.images) if spec.images else path
    files = sorted(file for file in path.rglob("*") if is_picture(file) and not file.name.startswith("."))
    if spec.rows is not None and len(files) != spec.rows:
        raise DataError(f"{path} has {len(files)} pictures, but data.{name}.rows says {spec.rows}: is it whole?")
    records = Packed(name, str(path), Path())
    for row, file in enumerate(files[: spec.take]):
        named = file.relative_to(root) if file.is_relative_to(root) else file
        records.append(row, named.as_posix(), (str(file),))
    logger.info("data '%s': %d pictures below %s", name, len(records), path)
    return _filled(Source(name, spec, "pictures", records))


def _filled(source: Source) -> Source:
    if not len(source.records):
        raise DataError(f"{source.spec.path} has no picture, which is all that a stage without a language loss sees")
    return source


@dataclass(frozen=True)
class NoText:
    """Stands in for the templates where texts are not read: one position that is never learned."""

    def encode(self, record: Record, placeholders: int, max_length: int) -> Encoded:
        """Raises `RowError` for a record without a picture."""
        if not record.images:
            raise RowError("image", "there is no picture, and nothing else is looked at here")
        none = torch.zeros(0, dtype=torch.int64)
        return Encoded(torch.tensor([SAFE_ID]), torch.tensor([IGNORED]), none)
