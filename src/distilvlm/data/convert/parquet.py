"""Parquet files with embedded pictures, as Hugging Face's hub has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from distilvlm.data.convert.arrow import AT_A_TIME, batches, labels, need_pyarrow, opened, store
from distilvlm.data.convert.items import Reading
from distilvlm.data.convert.tables import Columns, Row, Table, items
from distilvlm.data.problems import DataError

_SPLIT = re.compile(r"^(train|validation|valid|val|dev|test)(?=[-_.]|$)")


def read(
    source: Path,
    images: Path | None = None,
    *,
    split: str | None = None,
    question: str = "{question}",
    answer: str = "{answer}",
    image_field: str | None = None,
    conversation_field: str | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
) -> Reading:
    """Rows of parquet files with embedded pictures; see `tables.Columns` for the columns.

    Args:
        source: a file, a directory of files, or a pattern with `*`.
        images: the directory that embedded pictures are written to, and that paths of others start from.
        split: only files whose name begins with it (train-00000-of-00002.parquet), or that lie in a folder called so.

    Raises:
        DataError: no file, several splits and none chosen, a column that is not there, or pyarrow is missing.
    """
    columns = Columns(image_field, conversation_field, question_field, answer_field, question, answer)
    rows = table(source, split)
    kept = store(images, source)
    return Reading(kept.directory, items(rows.rows, columns.found(rows.names, source), kept, rows.labels))


def table(source: Path, split: str | None) -> Table:
    """The rows of a file, a directory or a pattern. Raises `DataError`, as `read`."""
    need_pyarrow()
    import pyarrow.parquet as pq

    files = _of_split(_parquet_files(source), split, source)
    schema = opened(lambda: pq.ParquetFile(files[0]), files[0]).schema_arrow

    def found() -> Iterator[Row]:
        for file in files:
            content = opened(lambda file=file: pq.ParquetFile(file), file)
            yield from batches(content.iter_batches(batch_size=AT_A_TIME), file)

    return Table(schema.names, found(), labels(schema))


def _parquet_files(source: Path) -> list[Path]:
    if source.is_dir():
        found = sorted(source.rglob("*.parquet"))
    elif source.is_file():
        found = [source]
    else:
        found = sorted(path for path in Path(source.anchor).glob(str(source.relative_to(source.anchor))))
    if not found:
        raise DataError(f"no parquet file at {source}: name a file, a directory, or a pattern such as 'data/*.parquet'")
    return found


def _of_split(files: Sequence[Path], split: str | None, source: Path) -> list[Path]:
    named = {file: _split_of(file) for file in files}
    if split is not None:
        chosen = [file for file in files if named[file] == split or file.parent.name == split]
        if not chosen:
            raise DataError(f"{source} has no file of split '{split}': {', '.join(file.name for file in files[:5])}")
        return chosen
    splits = sorted({name for name in named.values() if name})
    if source.is_dir() and len(splits) > 1:
        raise DataError(f"{source} holds the splits {', '.join(splits)}: choose one (split)")
    return list(files)


def _split_of(file: Path) -> str | None:
    found = _SPLIT.match(file.name) or _SPLIT.match(file.parent.name)
    return found.group(1) if found else None
