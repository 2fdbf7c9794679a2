"""Shards of WebDataset: tar files whose members of one name, KEY.json and KEY.jpg, are a sample.

The JSON is a row in LLaVA's or OpenAI's form. Its `image` names a member: whole ("train/000123.jpg"), or without the
key ("jpg") or its directory ("000123.jpg"); a row without `image` shows the pictures of its own sample, in the order in
which they stand. Rows may show pictures of other samples of the shard, so a picture need be in it only once.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from distilvlm.data import geometry
from distilvlm.data.convert.pictures import is_picture
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.streams.shards import Entry
from distilvlm.storage import Reader, Window, member

FORM = "tar 1"

LARGEST = 64 * 2**20
"""Bytes of a sample's JSON: more is no row."""


@dataclass
class _Sample:
    key: str
    row: Any = None
    reason: str | None = None  # why there is no row
    has_row: bool = False
    pictures: list[str] = field(default_factory=list)  # names of its own


@dataclass
class _Shard:
    name: str
    addresses: dict[str, str] = field(default_factory=dict)  # member -> where it lies
    problems: dict[str, str] = field(default_factory=dict)  # member -> why it is no picture
    samples: dict[str, _Sample] = field(default_factory=dict)
    lost: list[tuple[str, str]] = field(default_factory=list)  # (place, why): stretches that are no members


def index(name: str) -> Iterator[Entry]:
    """The rows of a shard, and what of it is broken. Raises DataError."""
    shard = _Shard(name)
    with Reader(name).stream() as stream:
        _walk(shard, stream)
    for sample in shard.samples.values():
        if not sample.has_row:
            continue  # pictures that rows of other samples may show
        if sample.reason is not None:
            yield Entry(sample.key, None, reason=sample.reason)
            continue
        try:
            yield Entry(sample.key, _placed(shard, sample))
        except RowError as error:
            yield Entry(sample.key, None, field=error.field, reason=error.reason)
    for place, reason in shard.lost:
        yield Entry(place, None, reason=reason)


def _walk(shard: _Shard, stream: BinaryIO) -> None:
    """Note every member. What is no header is passed over, block by block, up to the next one."""
    start = stream.read(262)
    if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd" or start[:3] == b"BZh":
        raise DataError(
            f"{shard.name} is compressed: nothing in it can be read at its place; unpack it to a plain .tar"
        )
    stream.seek(0)
    last, expected = "its beginning", 0
    try:
        with tarfile.open(fileobj=stream, mode="r:", ignore_zeros=True, errors="surrogateescape") as tar:
            while (found := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  (it remembers all that it has met)
                if found.offset > expected and _anything(stream, expected, found.offset):
                    _lose(shard, last, expected, found.offset)
                expected = tar.offset
                last = found.name
                if found.isfile():
                    _member(shard, stream, found)
    except tarfile.ReadError:
        pass  # the end came too soon: told below
    size = stream.seek(0, 2)
    if not expected:
        raise DataError(f"{shard.name} is no tar file, or an empty one")
    if size < expected:
        shard.lost.append((last, f"the file is cut off: {size:,} bytes, and '{last}' ends at {expected:,} at least"))
    elif _anything(stream, expected, size):
        _lose(shard, last, expected, size)
    elif not shard.lost and not any(sample.has_row for sample in shard.samples.values()):
        raise DataError(f"{shard.name} holds no sample: members are KEY.json and KEY.jpg")


def _lose(shard: _Shard, last: str, start: int, end: int) -> None:
    reason = f"bytes {start:,} to {end:,} are no members of a tar file: rows that stood there can't be read"
    shard.lost.append((f"behind {last}", reason))


def _anything(stream: BinaryIO, start: int, end: int) -> bool:
    """Whether there are bytes other than 0, with which a tar file is filled up."""
    stream.seek(start)
    while start < end and (block := stream.read(min(2**20, end - start))):
        if block.strip(b"\0"):
            return True
        start += len(block)
    return False


def _member(shard: _Shard, stream: BinaryIO, found: tarfile.TarInfo) -> None:
    path = PurePosixPath(found.name)
    base, _, suffix = path.name.partition(".")
    key = str(path.with_name(base)) if base else found.name
    name = found.name
    if suffix.lower() == "json":
        sample = shard.samples.setdefault(key, _Sample(key))
        sample.has_row = True
        if found.size > LARGEST:
            sample.reason = f"{name} has {found.size:,} bytes, more than a row's {LARGEST:,}"
            return
        stream.seek(found.offset_data)
        text = stream.read(found.size)
        if len(text) < found.size:
            sample.reason = f"{name} is cut off: {len(text):,} of {found.size:,} bytes"
            return
        try:
            sample.row = json.loads(text.decode("utf-8-sig"))
            json.dumps(sample.row)
        except (ValueError, RecursionError) as error:
            sample.reason = f"{name} is malformed JSON: {error}"
            return
        if not isinstance(sample.row, dict):
            sample.reason = f"{name} is {type(sample.row).__name__}, not an object"
    else:
        if is_picture(path):
            shard.samples.setdefault(key, _Sample(key)).pictures.append(name)
        shard.addresses[name] = member(shard.name, name, found.offset_data, found.size)
        content = io.BufferedReader(Window(_At(stream), found.offset_data, found.size), 4096)
        if (problem := geometry.problem_of(content)) is not None:
            shard.problems[name] = problem


class _At:
    """A stream that is read at places."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    def read(self, offset: int, size: int) -> bytes:
        self.stream.seek(offset)
        return self.stream.read(size)


def _placed(shard: _Shard, sample: _Sample) -> dict[str, Any]:
    """The row with addresses for names of members. Raises `RowError`."""
    row = dict(sample.row)
    field = next((key for key in ("image", "images") if row.get(key) is not None), None)
    if field is None:
        return (
            {**row, "image": [_address(shard, name, "image") for name in sample.pictures]} if sample.pictures else row
        )
    given = row[field]
    if isinstance(given, list):
        row[field] = [_shown(shard, sample, one, f"{field}[{number}]") for number, one in enumerate(given)]
    else:
        row[field] = _shown(shard, sample, given, field)
    return row


def _shown(shard: _Shard, sample: _Sample, given: Any, where: str) -> str:
    """The address of the member that a row names."""
    if not isinstance(given, str) or not given:
        raise RowError(where, "is not the name of a member")
    beside = str(PurePosixPath(sample.key).with_name(given)) if "/" not in given else given
    for name in (given, f"{sample.key}.{given}", beside):
        if name in shard.addresses:
            return _address(shard, name, where)
    own = ", ".join(sample.pictures) or "no picture"
    raise RowError(where, f"'{given}' is no member of {shard.name}; the sample has {own}: name that, or nothing")


def _address(shard: _Shard, name: str, where: str) -> str:
    if name in shard.problems:
        raise RowError(where, f"{name}: {shard.problems[name]}")
    return shard.addresses[name]
