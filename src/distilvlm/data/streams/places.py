"""What a source's `path` means: one file of rows, shards, or a directory of pictures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from distilvlm.data.problems import DataError
from distilvlm.data.streams.json_rows import JsonRows
from distilvlm.data.streams.shards import Shards
from distilvlm.data.streams.stored import Stored
from distilvlm.storage import Reader, is_remote, matching, stand

FORMS = (".tar", ".parquet")

PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def open_rows(path: str) -> Stored:
    """The rows of a JSON or JSONL file, or of shards: a name, a pattern, a range (`storage.matching`) or a directory.

    Raises:
        DataError: nothing is there, or it is no rows.
    """
    names = _names(path)
    suffixes = {_suffix(name) for name in names}
    if len(suffixes) > 1:
        raise DataError(
            f"{path} means files of different kinds ({', '.join(sorted(suffixes))}): name those of one kind"
        )
    (suffix,) = suffixes
    if suffix in FORMS:
        # What reads them stands above: it is what converts them, too, which reads rows itself.
        from distilvlm.data.streams import parquet, tar

        kind = tar if suffix == ".tar" else parquet
        return Shards(names, kind.index, kind.FORM)
    if suffix in PACKED:
        raise DataError(f"{names[0]} is compressed: nothing in it can be read at its place; unpack it to a plain .tar")
    if len(names) > 1:
        raise DataError(f"{path} means {len(names)} files, {names[0]} the first: shards are .tar or .parquet files")
    return JsonRows(names[0])


def here(path: str) -> bool:
    """Whether a source can be looked at: a file or directory of this machine, or shards or a file of a store."""
    try:
        return all(is_remote(name) or Path(name).exists() for name in _names(path))
    except DataError:
        return False


def state(path: str) -> list[Any]:
    """JSON-able: what a change of a source shows in. Of one local file its size and time; of a directory of pictures
    those of every file; of shards each one's. Raises DataError, OSError."""
    if Path(path).is_dir() and not shards_of(path):
        files = (file for file in sorted(Path(path).rglob("*")) if file.is_file())
        return [[str(file.relative_to(path)), *stand(str(file))] for file in files]
    names = _names(path)
    return stand(names[0]) if names == [path] else [[name, *stand(name)] for name in names]


def content(path: str) -> str:
    """A hash of what a source's rows are: of a JSON file's bytes; of shards, of what their change would show in."""
    names = _names(path)
    if len(names) > 1 or _suffix(names[0]) in FORMS:
        return hashlib.sha256(json.dumps([[name, *stand(name)] for name in names]).encode()).hexdigest()
    found = hashlib.sha256()
    for block in Reader(names[0]).blocks():
        found.update(block)
    return found.hexdigest()


def _names(path: str) -> list[str]:
    if not is_remote(path) and Path(path).is_dir():
        return shards_of(path) or [path]
    try:
        names = matching(path)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        raise DataError(f"{path} can't be looked for: {error}") from None
    if not names:
        raise DataError(f"no file is meant by {path}: look at its pattern")
    return names


def shards_of(directory: str) -> list[str]:
    """The shards that lie in a directory: what a directory without any holds are pictures."""
    return [str(file) for suffix in FORMS for file in sorted(Path(directory).glob(f"*{suffix}"))]


def _suffix(name: str) -> str:
    end = name.rsplit("/", 1)[-1].lower()
    return next((suffix for suffix in (*PACKED, *FORMS) if end.endswith(suffix)), "")
