"""Tensors of pictures, computed once per picture and kept on disk: features of a tower, or of an encoder that teaches.

    STORE/
      store.json                 what they were made with; another maker is refused, naming what differs
      index.json                 which picture (SHA-256 of its file) lies in which row of which shard
      paths.json                 size, time and SHA-256 of every file seen, so that it isn't hashed at every reading
      shards/00000.safetensors   each tensor [n, ...], and in its header the SHA-256 of every picture's part

Which pictures share a shard is decided, and written, before any is computed: a fill that is killed goes on at the
first missing shard and ends with the same bits, and several processes can fill one store. Pictures that come later go
into shards of their own. What is read is compared with its hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import sha256, sweep, write_whole

logger = logging.getLogger(__name__)

Seen = dict[str, tuple[int, int, str]]
"""Absolute path -> size in bytes, modification time in ns, SHA-256."""

Compute = Callable[[Tensor], dict[str, Tensor]]
"""Canvases, uint8 [pictures, 3, size, size] on the CPU -> what is kept of each, every tensor [pictures, ...]."""


class FeatureError(RuntimeError):
    """Kept features cannot be used as asked; the message says which, why and what to do."""


class PictureStore:
    """A directory of what one maker computes of pictures, refused for any other.

    Args:
        made_with: all that the tensors depend on, beside the picture; JSON-able, each with a name for people.
        shard: pictures per file, of the shards that this object plans.

    Raises:
        FeatureError: the directory holds what was made otherwise; says what differs.
    """

    def __init__(self, directory: str | Path, made_with: Mapping[str, Any], shard: int = 256) -> None:
        self.directory = Path(directory).absolute()
        self._shard = shard
        wanted = json.loads(json.dumps(made_with))  # tuples become lists, as they come back from the file
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(self.directory / "lock"):
            known = _read(self.directory / "store.json", None)
            if known is None:
                write_whole(self.directory / "store.json", json.dumps(wanted, indent=1).encode())
                return
        differing = [
            f"{field}: {_short(known.get(field))} there, {_short(wanted.get(field))} now"
            for field in sorted(known.keys() | wanted.keys())
            if known.get(field) != wanted.get(field)
        ]
        if differing:
            raise FeatureError(
                f"{self.directory} keeps features that were made otherwise:\n  "
                + "\n  ".join(differing)
                + "\nGive another directory, or remove this one to have them made anew"
            )

    def missing(self, paths: Iterable[str | Path]) -> int:
        """How many different pictures a fill would have to compute; nothing is planned."""
        seen: Seen = _read(self.directory / "paths.json", {})
        wanted: set[str] = set()
        for path in paths:
            try:
                wanted.add(_digest(str(path), seen))
            except OSError:
                continue  # filling names it
        there = [
            picture
            for i, pictures in enumerate(_read(self.directory / "index.json", {"shards": []})["shards"])
            if _shard(self.directory, i).exists()
            for picture in pictures
        ]
        return len(wanted.difference(there))

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
        with _filling(self.directory), pool as executor:
            wanted, known, shards = self._plan([str(path) for path in paths], skip_unreadable, unreadable)
            mine = [(i, pictures) for i, pictures in enumerate(shards) if not wanted.keys().isdisjoint(pictures)]
            total, done = sum(len(pictures) for _, pictures in mine), 0
            for number, (i, pictures) in enumerate(mine):
                place = _shard(self.directory, i)
                if not place.exists():
                    if number % world != rank:
                        continue
                    bad: dict[int, str] = {}
                    canvases = _canvases(
                        [known[digest] for digest in pictures], canvas, size, batch, executor, bad, skip_unreadable
                    )
                    self._compute(place, pictures, compute, canvases, bad)
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
        with _locked(self.directory / "lock"):
            seen: Seen = _read(self.directory / "paths.json", {})
            before = dict(seen)
            for path in paths:
                try:
                    wanted.setdefault(_digest(path, seen), []).append(path)
                except OSError as problem:
                    if not skip:
                        raise FeatureError(f"{path}: {problem}") from problem
                    unreadable[path] = str(problem)
            if seen != before:
                write_whole(self.directory / "paths.json", json.dumps(seen).encode())
            shards: list[list[str]] = _read(self.directory / "index.json", {"shards": []})["shards"]
            new = sorted(wanted.keys() - {picture for pictures in shards for picture in pictures})
            if new:
                shards += [new[start : start + self._shard] for start in range(0, len(new), self._shard)]
                write_whole(self.directory / "index.json", json.dumps({"version": 1, "shards": shards}).encode())
        known = {digest: path for path, (_, _, digest) in seen.items()}
        return wanted, known | {digest: paths[0] for digest, paths in wanted.items()}, shards

    def _compute(
        self, place: Path, pictures: list[str], compute: Compute, canvases: Iterator[Tensor], bad: dict[int, str]
    ) -> None:
        parts = [{name: value.to("cpu") for name, value in compute(batch).items()} for batch in canvases]
        tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
        hashes = [_hash({name: value[row] for name, value in tensors.items()}) for row in range(len(pictures))]
        # One entry, because safetensors writes several in an order that changes from process to process.
        about = {"pictures": _together(pictures), "unreadable": bad, "sha256": hashes}
        write_whole(place, lambda partial: save_file(tensors, partial, {"about": json.dumps(about)}))


class PictureReader:
    """Picture file -> its tensors on the CPU, in the dtype they are kept in.

    Can be pickled and forked: every process reads the index and opens the shards it needs when it first needs them.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._forget()

    def read(self, path: str | Path) -> dict[str, Tensor]:
        """Raises FeatureError for a picture that has nothing here, or something else than was written; says what to
        do."""
        i, row = self._row(str(path))
        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()  # open files are not shared with the process forked from
        if i not in self._open:
            place = _shard(self.directory, i)
            if not place.exists():
                raise FeatureError(f"{path}: its features are not computed yet: fill {self.directory} to the end")
            try:
                about = _about(place)
                opened = safe_open(place, "pt")
            except Exception as problem:  # what a damaged header raises is anything
                raise FeatureError(f"{place} is damaged ({problem}): remove the file and fill again") from problem
            if about["pictures"] != _together(self._shards[i]):
                raise FeatureError(f"{place} does not belong to this store's index: remove the file and fill again")
            self._open[i] = opened, about
        shard, about = self._open[i]
        if (reason := about["unreadable"].get(str(row))) is not None:
            raise FeatureError(f"{path}: {reason}")
        found = {name: shard.get_slice(name)[row] for name in shard.keys()}  # noqa: SIM118 - no mapping
        if "sha256" in about and _hash(found) != about["sha256"][row]:  # shards of earlier versions have none
            raise FeatureError(
                f"{_shard(self.directory, i)} is damaged: what it holds of {path} is not what was written. Remove the "
                "file and fill again"
            )
        return found

    def __contains__(self, path: str | Path) -> bool:
        """True if the picture has a place in the store; cheap, opens no shard."""
        try:
            self._row(str(path))
        except FeatureError:
            return False
        return True

    def __getstate__(self) -> Path:
        return self.directory

    def __setstate__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._forget()

    def _forget(self) -> None:
        self._places: dict[str, tuple[int, int]] | None = None
        self._seen: Seen = {}
        self._shards: list[list[str]] = []
        self._open: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._process = os.getpid()

    def _row(self, path: str) -> tuple[int, int]:
        if self._places is None:
            self._seen = _read(self.directory / "paths.json", {})
            self._shards = _read(self.directory / "index.json", {"shards": []})["shards"]
            self._places = {
                picture: (i, row) for i, pictures in enumerate(self._shards) for row, picture in enumerate(pictures)
            }
        try:
            digest = _digest(path, self._seen)
        except OSError as problem:
            raise FeatureError(f"{path}: {problem}") from problem
        if digest not in self._places:
            raise FeatureError(
                f"{path}: no features of this picture in {self.directory}; it was added or changed after the store was "
                "filled: fill it again"
            )
        return self._places[digest]


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


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(path: str, seen: Seen) -> str:
    """SHA-256 of a file, out of `seen` while its size and time are what they were; `seen` is brought up to date."""
    key = os.path.abspath(path)  # noqa: PTH100 - a link keeps its own name, which Path.resolve would not
    found = os.stat(key)  # noqa: PTH116 - twice as fast as Path's, and called for every sample
    entry = seen.get(key)
    if entry is None or tuple(entry[:2]) != (found.st_size, found.st_mtime_ns):
        entry = seen[key] = (found.st_size, found.st_mtime_ns, sha256(key))
    return entry[2]


def _shard(directory: Path, i: int) -> Path:
    return directory / "shards" / f"{i:05d}.safetensors"


def _unreadable(shard: Path) -> dict[int, str]:
    """Row -> reason of the pictures of a shard that could not be read when it was made."""
    return {int(row): reason for row, reason in _about(shard)["unreadable"].items()}


def _about(shard: Path) -> dict[str, Any]:
    with safe_open(shard, "pt") as opened:
        return json.loads(opened.metadata()["about"])


def _together(pictures: list[str]) -> str:
    return hashlib.sha256("".join(pictures).encode()).hexdigest()


def _read(file: Path, default: Any) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return default


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _filling(directory: Path) -> Iterator[None]:
    """Clear what killed fills left, unless another one runs now, and keep others from doing so meanwhile."""
    with (directory / "filling").open("wb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sweep(directory / "shards")
        except BlockingIOError:
            pass
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield
