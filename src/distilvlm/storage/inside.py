"""Pictures that are no files of their own but lie in one: a member of a tar shard, a cell of a parquet file.

Each has an address that stands wherever the path of a picture file stands, and says all that is needed to read it:

    inside:1536+20480:/data/shard-0001.tar#000123.jpg     20,480 bytes from 1,536 on
    inside:17.0:s3://bucket/train.parquet#image           the first picture in that column of row 17
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO, Protocol

from distilvlm.storage.reader import Reader, is_remote, reader, stand

PREFIX = "inside:"
_MEMBER = re.compile(r"inside:(\d+)\+(\d+):(.+?\.tar)#(.*)", re.DOTALL)
_CELL = re.compile(r"inside:(\d+)\.(\d+):(.+?\.parquet)#(.*)", re.DOTALL)

HELD = 256 * 2**20
"""Bytes of row groups that a process holds: parquet gives nothing smaller."""


def is_inside(path: str) -> bool:
    return path.startswith(PREFIX)


def member(file: str, name: str, offset: int, size: int) -> str:
    """The address of a tar's member."""
    return f"{PREFIX}{offset}+{size}:{file}#{name}"


def cell(file: str, column: str, row: int, position: int) -> str:
    """The address of a picture in a column of pictures, or of lists of pictures."""
    return f"{PREFIX}{row}.{position}:{file}#{column}"


def opened(path: str) -> BinaryIO:
    """A picture's bytes, of a file or inside of one. Raises OSError."""
    if not is_inside(path):
        return open(path, "rb")  # noqa: PTH123 - the caller's; a path of text, for every sample
    if found := _MEMBER.fullmatch(path):
        offset, size, file = int(found[1]), int(found[2]), found[3]
        if is_remote(file):
            return io.BytesIO(reader(file).read(offset, size))
        return io.BufferedReader(Window(reader(file), offset, size), 4096)
    if found := _CELL.fullmatch(path):
        return io.BytesIO(_groups.picture(found[3], found[4], int(found[1]), int(found[2])))
    raise FileNotFoundError(f"{path}: no address of a picture")


def digest(path: str) -> str:
    """SHA-256 of a picture's bytes, hexadecimal. Raises OSError."""
    found = hashlib.sha256()
    with opened(path) as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


def state(path: str) -> tuple[int, int]:
    """Size and time of change in ns of a picture's file, or of the one that it is in; of a store's object the size
    alone. Raises OSError."""
    found = _MEMBER.fullmatch(path) or _CELL.fullmatch(path) if is_inside(path) else None
    file = path if found is None else found[3]
    if is_remote(file):
        return reader(file).stand[0], 0
    size, changed = stand(file)
    return size, changed


class ReadAt(Protocol):
    def read(self, offset: int, size: int, /) -> bytes: ...


class Window(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, file: ReadAt, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        self.place = max(0, start + offset)
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any, /) -> int:
        content = self.file.read(self.offset + self.place, max(0, min(len(buffer), self.size - self.place)))
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


class _Groups:
    """Columns of row groups of parquet files, those that were used last."""

    def __init__(self) -> None:
        self.files: OrderedDict[tuple[Any, ...], tuple[Any, list[int]]] = OrderedDict()
        self.groups: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def picture(self, file: str, column: str, row: int, position: int) -> bytes:
        opened, ends = self._file(file)
        group = bisect_right(ends, row)
        if group == len(ends):
            raise OSError(f"{file} has no row {row}: it has changed")
        start = ends[group - 1] if group else 0
        key = (file, *reader(file).stand, column, group)
        if key in self.groups:
            self.groups.move_to_end(key)
        else:
            self.groups[key] = opened.read_row_group(group, columns=[column]).column(column)
            while len(self.groups) > 1 and sum(one.nbytes for one in self.groups.values()) > HELD:
                self.groups.popitem(last=False)
        return embedded(self.groups[key][row - start].as_py(), position)

    def _file(self, name: str) -> tuple[Any, list[int]]:
        import pyarrow.parquet as pq

        key = (os.getpid(), name, *reader(name).stand)  # a process of its own reads through a stream of its own
        if key not in self.files:
            while len(self.files) >= 64:
                self.files.popitem(last=False)
            file = pq.ParquetFile(Reader(name).stream())
            groups = (file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))
            ends: list[int] = []
            for rows in groups:
                ends.append((ends[-1] if ends else 0) + rows)
            self.files[key] = (file, ends)
        return self.files[key]


_groups = _Groups()


def embedded(value: Any, position: int) -> bytes:
    """The bytes of a picture of a cell: bytes, {"bytes"} (`datasets`' Image), or a list of these."""
    one = value[position] if isinstance(value, list) else value
    content = one.get("bytes") if isinstance(one, Mapping) else one
    if not isinstance(content, bytes):
        raise OSError("there is no picture in it")
    return content
