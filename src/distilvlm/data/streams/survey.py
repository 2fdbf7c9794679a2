"""What must be known of all rows of a source before a run: computed once, by several processes, and kept.

It is of the rows' content and of whether the pictures that they name are there, which is asked again where a directory
of theirs has changed. What is kept are numbers, not objects: 30 bytes a row.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distilvlm.data.batch import BadRow, SampleKey
from distilvlm.data.glance import Glance
from distilvlm.data.parallel import mapped
from distilvlm.data.problems import RowError
from distilvlm.data.streams.json_rows import SETTLED
from distilvlm.data.streams.stored import Stored
from distilvlm.data.turns import Draft, NoPictureError
from distilvlm.storage import is_inside, keep

STRETCH = 4096
"""Rows of a job."""

PAYS = 5 * STRETCH
"""Rows from which on what is found is kept."""

SHARED = 16 * STRETCH
"""Rows from which on several processes look at them: fewer take one process less time than it takes others to start."""

Looked = Callable[[Any], Draft | Glance]
"""A row's value to what is known of it. Raises `RowError`. Handed to other processes."""


@dataclass(frozen=True)
class Survey:
    """What is known of the rows that can be used, and of all that can't."""

    rows: np.ndarray  # [records] int64
    words: np.ndarray  # [records] int32, see `Records.words`
    pictures: np.ndarray  # [records] int32
    shown: np.ndarray  # [pictures of all records, 2] uint64: a hash of each one's name
    bad: list[BadRow]
    neutralised: int
    markers_added: int
    answers_dropped: int


def survey(source: str, rows: Stored, count: int, looked: Looked, root: Path, told: Any) -> Survey:
    """Look at the first `count` rows.

    Args:
        source: the name in the recipe.
        root: the directory that pictures' names are relative to.
        told: JSON-able: all else that decides on what `looked` gives.

    Raises:
        DataError: a malformed list.
    """
    if count < PAYS:
        return _survey(source, rows, _look(rows, count, looked, root))
    what = ["survey", 1, list(rows.files), count, str(root.absolute()), told]

    def make(_: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        began = time.time_ns() - int(SETTLED * 1e9)
        look = _look(rows, count, looked, root)
        stands = {name: at if at < began else 0 for name, at in _directories(look.directories).items()}
        about = {
            "counts": look.counts,
            "bad": look.bad,
            # Of a change that is seen by the pictures' directories, those that changed meanwhile tell nothing.
            "directories": stands,
        }
        arrays = {name: getattr(look, name) for name in ("rows", "words", "pictures", "shown")}
        return arrays, about

    def valid(about: dict[str, Any]) -> bool:
        return _directories(about["directories"]) == about["directories"]

    kept = keep(what, rows.content, make, valid)
    found = _Look(**kept.arrays, **{name: kept.about[name] for name in ("counts", "bad")}, directories=())
    return _survey(source, rows, found)


@dataclass(frozen=True)
class _Look:
    """What was found in a stretch of rows, or in several."""

    rows: np.ndarray
    words: np.ndarray
    pictures: np.ndarray
    shown: np.ndarray
    counts: Sequence[int]  # neutralised, markers added, answers dropped
    bad: Sequence[tuple[int, str, str]]  # row, field, reason
    directories: Sequence[str]  # of pictures


def _survey(source: str, rows: Stored, look: _Look) -> Survey:
    bad = [BadRow(SampleKey(source, rows.file_of(row), row), field, reason) for row, field, reason in look.bad]
    return Survey(look.rows, look.words, look.pictures, look.shown, bad, *look.counts)


def _look(rows: Stored, count: int, looked: Looked, root: Path) -> _Look:
    jobs = [range(start, min(start + STRETCH, count)) for start in range(0, max(count, 1), STRETCH)]
    looks = list(mapped(_Looking(rows, looked, root), jobs, 1 if count < SHARED else None))
    return _Look(
        **{
            name: np.concatenate([getattr(one, name) for one in looks])
            for name in ("rows", "words", "pictures", "shown")
        },
        counts=[sum(counts) for counts in zip(*(one.counts for one in looks), strict=True)],
        bad=[bad for one in looks for bad in one.bad],
        directories=sorted({directory for one in looks for directory in one.directories}),
    )


class _Looking:
    """Looks at a stretch of rows."""

    def __init__(self, rows: Stored, looked: Looked, root: Path) -> None:
        self.rows, self.looked, self.root = rows, looked, root

    def __call__(self, stretch: range) -> _Look:
        usable: list[int] = []
        words: list[int] = []
        pictures: list[int] = []
        names: list[str] = []
        missing: set[str] = set()
        bad: list[tuple[int, str, str]] = []
        neutralised = added = dropped = 0
        for row, value in zip(stretch, self.rows.stretch(stretch.start, stretch.stop), strict=True):
            try:
                found = self.looked(value)
            except RowError as error:
                bad.append((row, error.field, error.reason))
                if isinstance(error, NoPictureError):
                    missing.add(str(error.path.parent))
                continue
            usable.append(row)
            words.append(found.words)
            pictures.append(len(found.images))
            names += found.images
            neutralised += found.neutralised
            added += found.marker_added
            dropped += found.answers_dropped
        hashes, directories = _shown(names, self.root)
        return _Look(
            np.array(usable, np.int64),
            np.array(words, np.int32),
            np.array(pictures, np.int32),
            hashes,
            (neutralised, added, dropped),
            bad,
            sorted(missing | directories),
        )


def _shown(names: Sequence[str], root: Path) -> tuple[np.ndarray, set[str]]:
    """[names, 2] uint64: what tells a picture from others, whatever their number; and the directories of those that are
    files."""
    before = str(root / "x")[:-1]
    digests: dict[str, bytes] = {}
    below: set[str] = set()  # directories as they stand in names, with their last slash
    directories: set[str] = set()
    for name in set(names):
        path = name
        if not is_inside(name):
            # What pathlib would leave as it is is put together without it: it takes longer than all else of a row.
            if name[0] != "/" and name[-1] not in "/." and "//" not in name and "./" not in name:
                path = before + name
                below.add(name[: name.rfind("/") + 1])
            else:
                path = str(root / name)
                directories.add(os.path.dirname(path))  # noqa: PTH120
        digests[name] = hashlib.blake2b(os.fsencode(path), digest_size=16).digest()
    hashes = np.frombuffer(b"".join([digests[name] for name in names]), np.uint64).reshape(-1, 2)
    return hashes, directories | {os.path.dirname(f"{before}{one}x") for one in below}  # noqa: PTH120


def _directories(names: Sequence[str] | dict[str, int]) -> dict[str, int]:
    """When something was last added to each, or taken away; -1 for one that is not there."""
    found: dict[str, int] = {}
    for name in names:
        try:
            found[name] = os.stat(name or ".").st_mtime_ns  # noqa: PTH116
        except OSError:
            found[name] = -1
    return found
