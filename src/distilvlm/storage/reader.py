"""One file that is read at places: of this machine, or of a store that fsspec knows (s3://, gs://, https://, memory://)."""

from __future__ import annotations

import functools
import glob
import itertools
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

BLOCK = 8 * 2**20
"""Bytes that are read at once where a file is read from front to back."""

REGIONS = 32
"""Blocks of stores that a process holds: 256 MB."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_remote(name: str) -> bool:
    """Whether a name is a URL that fsspec opens."""
    return "://" in name


def matching(pattern: str) -> list[str]:
    """The files that a name, a pattern (`*`, `?`, `[...]`), or one with ranges (`{000..012}`, as WebDataset has them)
    means: of a pattern sorted, of ranges in their order; those that nothing is known of are named all the same."""
    found: list[str] = []
    for name in _ranges(pattern):
        if not glob.has_magic(name) or (not is_remote(name) and os.path.lexists(name)):
            found.append(name)
        elif is_remote(name):
            system, path = _system(name)
            found += sorted(system.unstrip_protocol(one) for one in system.glob(path))
        else:
            found += sorted(glob.glob(name, recursive=True))  # noqa: PTH207 - names stay as they were written
    return found


def stand(name: str) -> list[Any]:
    """What a change of a file shows in: size and time of change, or what its store says instead.

    Raises:
        FileNotFoundError, OSError: it is not there, or the store can't be asked.
    """
    if not is_remote(name):
        found = os.stat(name)  # noqa: PTH116 - of a name of text, for every picture of a data set
        return [found.st_size, found.st_mtime_ns]
    told = _system(name)[0].info(name)
    marks = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "md5", "checksum")
    return [told["size"], *(str(told[mark]) for mark in marks if told.get(mark) is not None)]


class Reader:
    """A file, read at places. Pickled and forked as it is; a file that changed meanwhile is refused.

    Attributes:
        name: as it was given.
        stand: see `stand`, of when it was opened.

    Raises:
        OSError: it can't be opened.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._open()

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from `offset` on; fewer where the file ends. Raises OSError."""
        if self._file is not None:
            found = os.fstat(self._file.fileno())
            if [found.st_size, found.st_mtime_ns] != self.stand:
                raise OSError(f"{self.name} was changed while it is in use: start again")
            return _pread(self._file, offset, size)
        return _regions.read(self.name, tuple(self.stand), offset, size)

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        """Everything from `offset` on, in blocks."""
        with self.stream() as stream:
            stream.seek(offset)
            while block := stream.read(BLOCK):
                yield block

    def stream(self) -> BinaryIO:
        """To be read from front to back."""
        if not is_remote(self.name):
            return Path(self.name).open("rb")
        system, path = _system(self.name)
        return cast(BinaryIO, system.open(path, "rb", block_size=BLOCK, cache_type="readahead"))

    def _open(self) -> None:
        self._file = None if is_remote(self.name) else Path(self.name).open("rb", buffering=0)  # noqa: SIM115
        self.stand = stand(self.name)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "stand": self.stand}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name = state["name"]
        self._open()
        if self.stand != state["stand"]:
            raise OSError(f"{self.name} was changed while it is in use: start again")


class Held(Reader):
    """A small file, all of it in memory: whatever happens to it meanwhile."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        with self.stream() as stream:
            self._content = stream.read()

    def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        yield from (self._content[start : start + BLOCK] for start in range(offset, len(self._content), BLOCK))

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "stand": self.stand, "_content": self._content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


@functools.lru_cache(64)
def _reader(name: str, at: tuple[Any, ...]) -> Reader:
    """One reader for all that is asked of a file while it stays what it is."""
    return Reader(name)


def reader(name: str) -> Reader:
    """A reader that this process has open, or opens. A store is not asked again whether the file has changed."""
    return _reader(name, () if is_remote(name) else tuple(stand(name)))


class _Regions:
    """What is read of stores. A place is asked for as it is; where another one near it follows soon, the whole block is
    fetched, so that reading in order is reading in blocks, and reading at random costs no more than was asked for."""

    def __init__(self) -> None:
        self.asked: OrderedDict[tuple[Any, ...], bytes | None] = OrderedDict()  # a block, or None: asked of once

    def read(self, name: str, at: tuple[Any, ...], offset: int, size: int) -> bytes:
        first, last = offset // BLOCK, max(offset, offset + size - 1) // BLOCK
        if last - first > 1:
            return _fetched(name, offset, offset + size)
        parts = [self._part(name, at, number, offset, offset + size) for number in range(first, last + 1)]
        return b"".join(parts)

    def _part(self, name: str, at: tuple[Any, ...], number: int, start: int, end: int) -> bytes:
        begin = number * BLOCK
        start, end = max(start, begin), min(end, begin + BLOCK)
        key = (name, at, number)
        known = key in self.asked
        block = self.asked.pop(key, None)
        if known and block is None:
            block = _fetched(name, begin, begin + BLOCK)
        self.asked[key] = block
        while len(self.asked) > REGIONS:
            self.asked.popitem(last=False)
        return _fetched(name, start, end) if block is None else block[start - begin : end - begin]


_regions = _Regions()


def _pread(file: Any, offset: int, size: int) -> bytes:
    """One call may give less than was asked for: at a signal, or where more than 2 GiB are."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(file.fileno(), size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _fetched(name: str, start: int, end: int) -> bytes:
    system, path = _system(name)
    return system.cat_file(path, start=start, end=end)


def _system(name: str) -> tuple[Any, str]:
    """The store of a URL, and the path there. fsspec holds one of a kind in every process."""
    try:
        import fsspec.core
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{name} is opened with fsspec: pip install 'distilvlm[stores]'") from None
    return fsspec.core.url_to_fs(name)


def _ranges(pattern: str) -> list[str]:
    """`{000..012}` as numbers of that width, every combination where there are several."""
    parts = _RANGE.split(pattern)  # text, first, last, text, ...
    choices = [[parts[0]]]
    for first, last, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        choices += [numbers, [text]]
    return ["".join(choice) for choice in itertools.product(*choices)]
