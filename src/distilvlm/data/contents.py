"""What the records of a source are by content, and the pictures that they show: each different one looked at once, in
several processes. What is kept of a million rows are numbers, not objects."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from distilvlm.data import geometry
from distilvlm.data.batch import BadRow
from distilvlm.data.geometry import PictureError
from distilvlm.data.inspection import image_field
from distilvlm.data.parallel import mapped
from distilvlm.data.readers import Source
from distilvlm.data.records import PICTURE, Record

STRETCH = 1024
"""Records, or pictures, of a job."""

Progress = Callable[[int, int, str], None]
"""Told how many are done, of how many, of what."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Contents:
    """What was found. Different pictures are numbered as they are met."""

    source: Source
    records: np.ndarray  # [records] uint64, the same for records that say and show the same
    shown: np.ndarray  # [shown] int64 the picture; a record's own stand together, records in order
    owners: np.ndarray  # [shown] int64 the record
    firsts: np.ndarray  # [pictures, 2] int64 record that first shows it, and where among its pictures
    sizes: np.ndarray  # [pictures, 2] int32 width and height (see `_size`); 0 where it can't be read
    digests: np.ndarray | None  # [pictures] uint64, the same for files of the same bytes; None: not asked for
    problems: dict[int, str]  # picture → why it can't be read

    def path(self, picture: int) -> str:
        record, place = self.firsts[picture]
        return self.source.records[int(record)].images[int(place)]

    def bad(self) -> list[BadRow]:
        """Rows that show a picture that can't be read."""
        broken = np.isin(self.shown, list(self.problems))
        found: dict[int, BadRow] = {}
        starts = np.searchsorted(self.owners, self.owners)  # where each one's record begins
        for place in np.flatnonzero(broken):
            number = int(self.owners[place])
            if number not in found:
                record = self.source.records[number]
                field = image_field(record, int(place - starts[place]))
                found[number] = BadRow(record.key, field, self.problems[int(self.shown[place])])
        return list(found.values())

    def same_rows(self) -> list[np.ndarray]:
        """Groups of two and more records that say and show the same, the first one first."""
        return _groups(self.records)

    def same_pictures(self) -> list[np.ndarray]:
        """Groups of two and more pictures of different names and the same bytes."""
        if self.digests is None:
            return []
        readable = np.flatnonzero(self.sizes[:, 0])
        return [readable[group] for group in _groups(self.digests[readable])]


def look(
    source: Source,
    *,
    decoded: bool = False,
    content: bool = False,
    progress: Progress | None = None,
) -> Contents:
    """Look at every record, and at every different picture once: its header, or more.

    Args:
        decoded: decode it.
        content: read all of its bytes, for which pictures are the same.
        progress: called now and then.
    """
    count = len(source.records)
    digests, names, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    places = [np.zeros(0, np.int64)]
    for stretch, found in _each(_Reading(source), range(count), "rows", progress):
        said, shown, number = found
        digests.append(said)
        names.append(shown)
        owners.append(stretch.start + np.repeat(np.arange(len(number)), number))
        places.append(np.concatenate([np.arange(own) for own in number]) if len(number) else places[0])
    every, owner, place = np.concatenate(names), np.concatenate(owners), np.concatenate(places)
    _, first, shown = np.unique(every, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    firsts = np.stack([owner[first[order]], place[first[order]]], axis=1)
    sizes, contents, problems = [np.zeros((0, 2), np.int32)], [np.zeros(0, np.uint64)], {}
    looking = _Looking(source, firsts, decoded, content)
    for stretch, (size, digest, problem) in _each(looking, range(len(firsts)), "pictures", progress):
        sizes.append(size)
        contents.append(digest)
        problems |= {stretch.start + number: reason for number, reason in problem.items()}
    return Contents(
        source,
        np.concatenate(digests),
        rank[shown],
        owner,
        firsts,
        np.concatenate(sizes),
        np.concatenate(contents) if content else None,
        problems,
    )


def tokens(source: Source, tokenizer: object, progress: Progress | None = None) -> np.ndarray:
    """[records, 2] int32: tokens of all texts of a record (of a pair, with the chosen answer), and of its answers. No
    template is about them, and pictures are none."""
    found = [
        counts for _, counts in _each(_Tokenising(source, tokenizer), range(len(source.records)), "rows", progress)
    ]
    return np.concatenate([np.zeros((0, 2), np.int32), *found])


def _each(
    work: Callable[[range], Result], every: range, of: str, progress: Progress | None
) -> Iterator[tuple[range, Result]]:
    jobs = [every[start : start + STRETCH] for start in range(0, len(every), STRETCH)]
    for job, result in zip(jobs, mapped(work, jobs), strict=True):
        yield job, result
        if progress:
            progress(job.stop, len(every), of)


@dataclass(frozen=True)
class _Reading:
    """Digests of records and of their pictures' names."""

    source: Source

    def __call__(self, stretch: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        records = [self.source.records[number] for number in stretch]
        return (
            np.array([_digest(_said(record)) for record in records], np.uint64),
            np.array(
                [_digest(name.encode("utf-8", "surrogateescape")) for one in records for name in one.images], np.uint64
            ),
            np.array([len(record.images) for record in records], np.int64),
        )


@dataclass(frozen=True)
class _Looking:
    """Size, digest and problem of pictures."""

    source: Source
    firsts: np.ndarray
    decoded: bool
    content: bool

    def __call__(self, stretch: range) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        sizes = np.zeros((len(stretch), 2), np.int32)
        digests = np.zeros(len(stretch), np.uint64)
        problems: dict[int, str] = {}
        for number, picture in enumerate(stretch):
            record, place = self.firsts[picture]
            path = self.source.records[int(record)].images[int(place)]
            try:
                size = _size(path, self.decoded)
                if self.content:
                    digests[number] = int(geometry.content(path)[:16], 16)
            except PictureError as error:
                problems[number] = str(error)
            else:
                sizes[number] = size
        return sizes, digests, problems


@dataclass(frozen=True)
class _Tokenising:
    """Tokens of records' texts."""

    source: Source
    tokenizer: object

    def __call__(self, stretch: range) -> np.ndarray:
        records = [self.source.records[number] for number in stretch]
        turns = [(number, turn) for number, record in enumerate(records) for turn in record.turns]
        counts = np.zeros((len(records), 2), np.int32)
        if turns:
            texts = [turn.text.replace(f"{PICTURE}\n", "").replace(PICTURE, "") for _, turn in turns]
            ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
            for (number, turn), text in zip(turns, ids, strict=True):
                counts[number] += (len(text), len(text) if turn.role == "assistant" else 0)
        return counts


def _size(path: str, decoded: bool) -> tuple[int, int]:
    """Upright where that is cheap to know: a PNG says at its end how it is turned, and hardly one does."""
    if decoded:
        return geometry.decode(path).size
    is_jpeg = path.lower().endswith((".jpg", ".jpeg"))
    return geometry.upright_size(path) if is_jpeg else geometry.header(path)


def _said(record: Record) -> bytes:
    sides = [[(turn.role, turn.text) for turn in side] for side in (record.turns, record.other)]
    return repr((record.images, sides, record.desirable)).encode("utf-8", "surrogatepass")


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _groups(digests: np.ndarray) -> list[np.ndarray]:
    """Numbers of equal digests, of two and more, in order of the first."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])) if len(order) else []
    groups = [order[start:end] for start, end in pairwise(edges) if end - start > 1]
    return sorted(groups, key=lambda group: int(group[0]))
