"""Directories that Hugging Face's `datasets` saved (`save_to_disk`). They are Arrow streams: pyarrow reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distilvlm.data.convert.arrow import batches, labels, need_pyarrow, opened, store
from distilvlm.data.convert.items import Reading
from distilvlm.data.convert.tables import Columns, Row, Table, items
from distilvlm.data.problems import DataError


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
    """Rows of a directory that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; see `tables.Columns`.

    Args:
        source: the directory.
        images: as `parquet`.
        split: of a DatasetDict.

    Raises:
        DataError: no such directory or split, a column that is not there, or pyarrow is missing.
    """
    columns = Columns(image_field, conversation_field, question_field, answer_field, question, answer)
    rows = table(source, split)
    kept = store(images, source)
    return Reading(kept.directory, items(rows.rows, columns.found(rows.names, source), kept, rows.labels))


def is_saved(source: Path) -> bool:
    """Whether `save_to_disk` wrote the directory."""
    return any((source / name).is_file() for name in ("state.json", "dataset_dict.json"))


def table(source: Path, split: str | None) -> Table:
    """The rows of a saved data set. Raises `DataError`, as `read`."""
    need_pyarrow()
    import pyarrow as pa

    directory = _split_directory(source, split)
    state = _json(directory / "state.json", "Dataset.save_to_disk")
    if state.get("_indices_files"):
        raise DataError(f"{directory} holds a choice of rows by index: call flatten_indices() before save_to_disk")
    files = [directory / entry["filename"] for entry in state["_data_files"]]
    if not files:
        raise DataError(f"{directory} holds no data file")

    def stream(file: Path) -> Any:
        return opened(lambda: pa.ipc.open_stream(pa.memory_map(str(file))), file)

    def found() -> Iterator[Row]:
        for file in files:
            yield from batches(stream(file), file)

    schema = stream(files[0]).schema
    return Table(schema.names, found(), labels(schema))


def _split_directory(source: Path, split: str | None) -> Path:
    if not (source / "dataset_dict.json").is_file():
        if split is not None:
            raise DataError(f"{source} is one data set without splits: leave split out")
        return source
    splits = _json(source / "dataset_dict.json", "DatasetDict.save_to_disk")["splits"]
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is None or split not in splits:
        raise DataError(f"{source} holds the splits {', '.join(splits)}: choose one (split), here {split!r}")
    return source / split


def _json(file: Path, writer: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no {file}: a directory written by {writer} is expected") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} can't be read: {error}") from None
