"""Tensors of pictures, computed once per picture and kept on disk: features of a tower, or of an encoder that teaches.

STORE/        shards of a picture's tensors under the SHA-256 of its file, as shards.py keeps them, and
  paths.json  size, time and SHA-256 of every file seen, so that it isn't hashed at every reading
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilvlm import storage

from .files import write_whole
from .shards import FeatureError, ShardReader, ShardStore, about_shard, read_json

__all__ = ["FeatureError", "PictureReader", "PictureStore"]

logger = logging.getLogger(__name__)

Seen = dict[str, tuple[int, int, str]]
"""Absolute path -> size in bytes, modification time in ns, SHA-256."""

Compute = Callable[[Tensor], dict[str, Tensor]]
"""Canvases, uint8 [pictures, 3, size, size] on the CPU -> what is kept of each, every tensor [pictures, ...]."""


class PictureStore(ShardStore):
    """A directory of what one maker computes of pictures, refused for any other.

    Args:
        made_with: all that the tensors depend on, beside the picture; JSON-able, each with a name for people.
        shard: pictures per file, of the shards that this object plans.

    Raises:
        FeatureError: the directory holds what was made otherwise; says what differs.
    """

    def __init__(self, directory: str | Path, made_with: Mapping[str, Any], shard: int = 256) -> None:
        super().__init__(directory, made_with)
        self._shard = shard

    def missing_of(self, paths: Iterable[str | Path]) -> int:
        """How many different pictures a fill would have to compute; nothing is planned."""
        seen: Seen = read_json(self.directory / "paths.json", {})
        wanted: set[str] = set()
        for path in paths:
            try:
                wanted.add(digest(str(path), seen))
            except OSError:
                continue  # filling names it
        return len(self.missing(wanted))

    def fill_with(
        self,
        paths: Iterable[str | Path],
        compute: Compute,
        canvas: Callable[[str], Tensor],
        size: int,
        batch: int = 16,
        rank: int = 0,
        world: int = 1,
        skip_unreadable: bool = False,
        progress: Callable[[int, int], object] | None = None,
        threads: int = 0,
    ) -> dict[str, str]:
        """Compute what is missing; call it again after a kill.

        Args:
            paths: picture files, of any number and order, repeated or not.
            canvas: picture file -> uint8 [3, size, size].
            size: side of the canvases.
            batch: pictures per call of `compute`.
            rank, world: of `world` processes given the same paths, this one computes every `world`-th shard. Wait for
                all of them before reading.
            skip_unreadable: go on where a picture cannot be read or decoded.
            progress: called with the pictures done, those of earlier fills included, and their total.
            threads: that decode the next batch while one is computed.

        Returns:
            path, as given -> reason of pictures that could not be read; asking the reader for one raises FeatureError.

        Raises:
            FeatureError: names the picture that could not be read, unless `skip_unreadable`.
        """
        unreadable: dict[str, str] = {}
        pool = ThreadPoolExecutor(threads) if threads else nullcontext()
        with self.filling(), pool as executor:
            wanted, known, shards = self._plan([str(path) for path in paths], skip_unreadable, unreadable)
            mine = [(i, pictures) for i, pictures in enumerate(shards) if not wanted.keys().isdisjoint(pictures)]
            total, done = sum(len(pictures) for _, pictures in mine), 0
            for number, (i, pictures) in enumerate(mine):
                place = self.place(i)
                if not place.exists():
                    if number % world != rank:
                        continue
                    bad: dict[int, str] = {}
                    canvases = _canvases(
                        [known[digest] for digest in pictures], canvas, size, batch, executor, bad, skip_unreadable
                    )
                    self.write(i, _items(compute, canvases), unreadable=bad)
                for row, reason in _unreadable(place).items():
                    unreadable |= dict.fromkeys(wanted.get(pictures[row], ()), reason)
                done += len(pictures)
                if progress:
                    progress(done, total)
        if unreadable:
            logger.warning("%d pictures have no features, because they could not be read", len(unreadable))
        return unreadable

    def _plan(
        self, paths: list[str], skip: bool, unreadable: dict[str, str]
    ) -> tuple[dict[str, list[str]], dict[str, str], list[list[str]]]:
        """Hash the files that are new, and give the pictures that are new a place.

        Returns SHA-256 -> paths of the wanted pictures, SHA-256 -> a path of all that are known, and all shards.
        """
        wanted: dict[str, list[str]] = {}
        with self.locked():
            seen: Seen = read_json(self.directory / "paths.json", {})
            before = dict(seen)
            for path in paths:
                try:
                    wanted.setdefault(digest(path, seen), []).append(path)
                except OSError as problem:
                    if not skip:
                        raise FeatureError(f"{path}: {problem}") from problem
                    unreadable[path] = str(problem)
            if seen != before:
                write_whole(self.directory / "paths.json", json.dumps(seen).encode())
        if len(wanted) < (files := sum(len(names) for names in wanted.values())):
            logger.info("%s: %d files are %d different pictures, each kept once", self.directory, files, len(wanted))
        size = self._shard
        shards = self.plan(sorted(wanted), lambda new: [new[i : i + size] for i in range(0, len(new), size)])
        known = {digest: path for path, (_, _, digest) in seen.items()}
        return wanted, known | {digest: paths[0] for digest, paths in wanted.items()}, shards


class PictureReader(ShardReader):
    """Picture file -> its tensors on the CPU, in the dtype they are kept in; pickled and forked as any reader."""

    def read(self, path: str | Path) -> dict[str, Tensor]:
        """Raises FeatureError for a picture that has nothing here, or something else than was written; says what to
        do."""
        i, row = self._row(str(path))
        _, about = self.opened(i, str(path))
        if (reason := about["unreadable"].get(str(row))) is not None:
            raise FeatureError(f"{path}: {reason}")
        return self.tensors(i, row, str(path))

    def __contains__(self, path: str | Path) -> bool:
        """True if the picture has a place in the store; cheap, opens no shard."""
        try:
            self._row(str(path))
        except FeatureError:
            return False
        return True

    def _forget(self) -> None:
        super()._forget()
        self._seen: Seen | None = None

    def _row(self, path: str) -> tuple[int, int]:
        seen = self._seen
        if seen is None:
            seen = self._seen = dict(read_json(self.directory / "paths.json", {}))
        try:
            place = self.place(digest(path, seen))
        except OSError as problem:
            raise FeatureError(f"{path}: {problem}") from problem
        if place is None:
            raise FeatureError(
                f"{path}: no features of this picture in {self.directory}; it was added or changed after the store was "
                "filled: fill it again"
            )
        return place


def _items(compute: Compute, canvases: Iterator[Tensor]) -> list[dict[str, Tensor]]:
    """What is kept of each picture."""
    made = [{name: value.to("cpu") for name, value in compute(batch).items()} for batch in canvases]
    return [{name: value[row] for name, value in part.items()} for part in made for row in range(_count(part))]


def _count(part: Mapping[str, Tensor]) -> int:
    return len(next(iter(part.values())))


def _canvases(
    paths: list[str],
    canvas: Callable[[str], Tensor],
    size: int,
    batch: int,
    executor: Executor | None,
    bad: dict[int, str],
    skip_unreadable: bool,
) -> Iterator[Tensor]:
    """Batches of canvases; a black one stands for a picture that cannot be read, whose reason goes into `bad`."""

    def one(path: str) -> Tensor | str:
        try:
            return canvas(path)
        except Exception as problem:  # what a picture library raises on a broken file is anything
            if not skip_unreadable:
                raise FeatureError(f"{path}: cannot be read as a picture: {problem}") from problem
            return f"cannot be read as a picture: {problem}"

    starts = range(0, len(paths), batch)
    # Of one batch ahead, not of all: a thousand canvases of 1,024 px are 3 GB.
    groups = (paths[start : start + batch] for start in starts)
    ahead = _ahead(groups, one, executor)
    for start, made in zip(starts, ahead, strict=True):
        together = torch.zeros(len(made), 3, size, size, dtype=torch.uint8)
        for place, found in enumerate(made):
            if isinstance(found, str):
                bad[start + place] = found
            else:
                together[place] = found
        yield together


def _ahead(
    groups: Iterator[list[str]], one: Callable[[str], Tensor | str], executor: Executor | None
) -> Iterator[list[Tensor | str]]:
    """Every group's results, the next group's being made while one is worked on."""
    if executor is None:
        for group in groups:
            yield [one(path) for path in group]
        return
    coming: Iterator[Tensor | str] | None = None
    for group in groups:
        current, coming = coming, executor.map(one, group)
        if current is not None:
            yield list(current)
    if coming is not None:
        yield list(coming)


def digest(path: str, seen: Seen) -> str:
    """SHA-256 of a picture (a file, or in one), out of `seen` while its size and time are what they were; `seen` is
    brought up to date."""
    # A link keeps its own name, which Path.resolve would not.
    key = path if storage.is_inside(path) else os.path.abspath(path)  # noqa: PTH100
    found = storage.state(key)
    entry = seen.get(key)
    if entry is None or tuple(entry[:2]) != found:
        entry = seen[key] = (*found, storage.digest(key))
    return entry[2]


def _unreadable(shard: Path) -> dict[int, str]:
    """Row -> reason of the pictures of a shard that could not be read when it was made."""
    return {int(row): reason for row, reason in about_shard(shard)["unreadable"].items()}
