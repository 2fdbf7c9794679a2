"""What parquet files and `datasets` directories share: both are Arrow tables, read with pyarrow."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from distilvlm.data.convert.embedded import Store
from distilvlm.data.convert.tables import Row
from distilvlm.data.problems import DataError

AT_A_TIME = 64
"""Rows that are held in memory as Python objects: they hold pictures."""


def need_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        raise DataError("parquet and `datasets` files are read with pyarrow: pip install 'distilvlm[data]'") from None


def opened(read: Callable[[], Any], file: Path) -> Any:
    """What `read` opens, or an error that names the file."""
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} can't be read: {error}; is it whole?") from None


def batches(stream: Iterable[Any], file: Path) -> Iterator[Row]:
    """The rows of record batches."""
    number, waiting = 0, iter(stream)
    while (batch := opened(lambda: next(waiting, None), file)) is not None:
        for start in range(0, batch.num_rows, AT_A_TIME):
            for row in batch.slice(start, AT_A_TIME).to_pylist():
                yield str(file), number, row
                number += 1


def store(images: Path | None, source: Path) -> Store:
    if images is None:
        raise DataError(f"{source}: say where embedded pictures go (images)")
    return Store(Path(os.path.normpath(images.absolute())))


def labels(schema: Any) -> dict[str, list[str]]:
    """Names of classes that a column holds the numbers of, as `datasets` notes them in the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: f["names"] for name, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
