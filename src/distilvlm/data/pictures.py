"""Pictures alone, of a directory or of any data file: what a stage learns from whose language model does not run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from distilvlm.data.batch import IGNORED
from distilvlm.data.convert.pictures import is_picture
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.readers import Source, read
from distilvlm.data.records import Record, Records
from distilvlm.data.template import SAFE_ID, Encoded
from distilvlm.recipe.schema import SourceSpec

logger = logging.getLogger(__name__)


def read_pictures(spec: SourceSpec, name: str) -> Source:
    """The different pictures of a source, one record each: all below a directory, or all that a data file's rows show.

    Raises:
        DataError: as `readers.read`; no picture; or a directory with another number of them than the recipe says.
    """
    path = Path(spec.path)
    if path.is_dir():
        return _below(path, spec, name)
    rows = read(spec, name)
    source = Source(name, spec, rows.format, Records(name, str(path), Path()), rows.bad)
    seen: set[str] = set()
    shown = 0
    for record in rows.records:
        shown += len(record.images)
        for image in record.images:
            if image not in seen:
                seen.add(image)
                source.records.append(record.key.row, record.id, (image,), ())
    textual = int((rows.records.pictures == 0).sum())
    logger.info(
        "data '%s': %d different pictures of the %d that %d rows show; %d rows of text only are not looked at",
        *(name, len(seen), shown, len(rows.records), textual),
    )
    return _filled(source)


def _below(path: Path, spec: SourceSpec, name: str) -> Source:
    root = Path(spec.images) if spec.images else path
    files = sorted(file for file in path.rglob("*") if is_picture(file) and not file.name.startswith("."))
    if spec.rows is not None and len(files) != spec.rows:
        raise DataError(f"{path} has {len(files)} pictures, but data.{name}.rows says {spec.rows}: is it whole?")
    source = Source(name, spec, "pictures", Records(name, str(path), Path()))
    for row, file in enumerate(files[: spec.take]):
        named = file.relative_to(root) if file.is_relative_to(root) else file
        source.records.append(row, named.as_posix(), (str(file),), ())
    logger.info("data '%s': %d pictures below %s", name, len(source.records), path)
    return _filled(source)


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
