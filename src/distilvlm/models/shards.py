"""Tensors of many things, each computed once and kept on disk under a key that says what it is of.

    STORE/
      store.json                 what they were made with; another maker is refused, naming what differs
      index.json                 which key lies in which row of which shard
      shards/00000.safetensors   the tensors of each key, and in its header the SHA-256 of every key's part

Which keys share a shard is decided, and written, before any is computed: a fill that is killed goes on at the first
missing shard and ends with the same bits, and several processes can fill one store. Keys that come later go into shards
of their own. What is read is compared with its hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import sweep, write_whole

Item = Mapping[str, Tensor]
"""What is kept under one key, by name."""


class FeatureError(RuntimeError):
    """Kept tensors cannot be used as asked; the message says which, why and what to do."""


class ShardStore:
    """A directory of what one maker computes, refused for any other.

    Args:
        made_with: all that the tensors depend on, beside what the keys are of; JSON-able, each with a name for people.

    Raises:
        FeatureError: the directory holds what was made otherwise; says what differs.
    """

    def __init__(self, directory: str | Path, made_with: Mapping[str, Any]) -> None:
        self.directory = Path(directory).absolute()
        wanted = json.loads(json.dumps(made_with))  # tuples become lists, as they come back from the file
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.locked():
            known = read_json(self.directory / "store.json", None)
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
                f"{self.directory} keeps what was made otherwise:\n  "
                + "\n  ".join(differing)
                + "\nGive another directory, or remove this one to have it made anew"
            )

    def shards(self) -> list[list[str]]:
        """The keys of every shard that is planned, written or not."""
        return read_json(self.directory / "index.json", {"shards": []})["shards"]

    def place(self, i: int) -> Path:
        return shard_file(self.directory, i)

    def missing(self, wanted: Iterable[str]) -> set[str]:
        """The keys that a fill would have to compute; nothing is planned."""
        there = itertools.chain.from_iterable(keys for i, keys in enumerate(self.shards()) if self.place(i).exists())
        return set(wanted).difference(there)

    @contextmanager
    def locked(self) -> Iterator[None]:
        with (self.directory / "lock").open("wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextmanager
    def filling(self, obtainable: Collection[str] | None = None) -> Iterator[None]:
        """Clear what killed fills left, unless another one runs now, and keep others from doing so meanwhile.

        Args:
            obtainable: the keys that can be computed now: a shard that was planned for others, too, and is not
                written, is given up. None: all.
        """
        with (self.directory / "filling").open("wb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                sweep(self.directory / "shards")
                if obtainable is not None:
                    self._give_up(set(obtainable))
            except BlockingIOError:
                pass
            fcntl.flock(stream, fcntl.LOCK_SH)
            yield

    def plan(self, wanted: Iterable[str], group: Callable[[list[str]], list[list[str]]]) -> list[list[str]]:
        """Give the keys that are new a place, in their order; returns the keys of all shards.

        Args:
            group: keys to the shards that they make.
        """
        with self.locked():
            shards = self.shards()
            known = {key for keys in shards for key in keys}
            new = [key for key in wanted if key not in known]
            if new:
                shards += group(new)
                self._write_index(shards)
        return shards

    def write(self, i: int, items: Sequence[Item], ragged: bool = False, **about: Any) -> None:
        """Write shard `i`: what is kept under each of its keys, in their order.

        Args:
            ragged: the first dimensions of a tensor differ from key to key, and not every key has all of them.
            about: what else its header shall say, JSON-able.
        """
        names = sorted({name for item in items for name in item})
        if ragged:
            tensors = {name: torch.cat([item[name] for item in items if name in item]) for name in names}
            about["rows"] = {name: [len(item[name]) if name in item else -1 for item in items] for name in names}
        else:
            tensors = {name: torch.stack([item[name] for item in items]) for name in names}
        hashes = [hash_of(item) for item in items]
        # One entry, because safetensors writes several in an order that changes from process to process.
        content = json.dumps({"keys": _together(self.shards()[i]), "sha256": hashes, **about})
        write_whole(self.place(i), lambda partial: save_file(tensors, partial, {"about": content}))

    def _give_up(self, obtainable: set[str]) -> None:
        with self.locked():
            shards = self.shards()
            kept = [
                keys if self.place(i).exists() or obtainable.issuperset(keys) else [] for i, keys in enumerate(shards)
            ]
            if kept != shards:
                self._write_index(kept)

    def _write_index(self, shards: list[list[str]]) -> None:
        write_whole(self.directory / "index.json", json.dumps({"version": 1, "shards": shards}).encode())


class ShardReader:
    """Key -> its tensors on the CPU, in the dtype they are kept in.

    Can be pickled and forked: every process reads the index and opens the shards it needs when it first needs them.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._forget()

    def place(self, key: str) -> tuple[int, int] | None:
        """Shard and row of a key; None if it has no place."""
        return self._index().get(key)

    def opened(self, i: int, told: str) -> tuple[Any, dict[str, Any]]:
        """Shard `i` and what its header says; errors name what was asked for, `told`."""
        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()  # open files are not shared with the process forked from
        if i not in self._open:
            place = shard_file(self.directory, i)
            if not place.exists():
                raise FeatureError(f"{told}: its features are not computed yet: fill {self.directory} to the end")
            try:
                about = about_shard(place)
                opened = safe_open(place, "pt")
            except Exception as problem:  # what a damaged header raises is anything
                raise FeatureError(f"{place} is damaged ({problem}): remove the file and fill again") from problem
            if (about.get("keys") or about.get("pictures")) != _together(self._shards[i]):  # as earlier versions had it
                raise FeatureError(f"{place} does not belong to this store's index: remove the file and fill again")
            if "rows" in about:
                about["ends"] = {
                    name: list(itertools.accumulate(max(0, n) for n in own)) for name, own in about["rows"].items()
                }
            self._open[i] = opened, about
        return self._open[i]

    def tensors(self, i: int, row: int, told: str) -> dict[str, Tensor]:
        """What lies in a row of a shard. Raises FeatureError where it is something else than was written."""
        shard, about = self.opened(i, told)
        found: dict[str, Tensor] = {}
        for name in shard.keys():  # noqa: SIM118 - no mapping
            if "rows" not in about:
                found[name] = shard.get_slice(name)[row]
            elif (count := about["rows"][name][row]) >= 0:
                end = about["ends"][name][row]
                found[name] = shard.get_slice(name)[end - count : end]
        if "sha256" in about and hash_of(found) != about["sha256"][row]:  # shards of earlier versions have none
            raise FeatureError(
                f"{shard_file(self.directory, i)} is damaged: what it holds of {told} is not what was written. Remove "
                "the file and fill again"
            )
        return found

    def __getstate__(self) -> Path:
        return self.directory

    def __setstate__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._forget()

    def _forget(self) -> None:
        self._places: dict[str, tuple[int, int]] | None = None
        self._shards: list[list[str]] = []
        self._open: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._process = os.getpid()

    def _index(self) -> dict[str, tuple[int, int]]:
        if self._places is None:
            self._shards = read_json(self.directory / "index.json", {"shards": []})["shards"]
            self._places = {key: (i, row) for i, keys in enumerate(self._shards) for row, key in enumerate(keys)}
        return self._places


def hash_of(tensors: Item) -> str:
    """SHA-256 of tensors, by the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shard_file(directory: Path, i: int) -> Path:
    return directory / "shards" / f"{i:05d}.safetensors"


def about_shard(file: Path) -> dict[str, Any]:
    """What a shard's header says of it."""
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["about"])


def read_json(file: Path, default: Any) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return default


def _together(keys: list[str]) -> str:
    return hashlib.sha256("".join(keys).encode()).hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
