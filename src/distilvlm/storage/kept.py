"""What is computed of large files once and kept: arrays that are mapped into memory, and text that is read at places.

CACHE/WHAT-STATE.arrays   safetensors; its metadata say of what it is
CACHE/WHAT-STATE.text     where there is one; written first

CACHE is $DISTILVLM_CACHE, else `distilvlm` in the user's cache directory. WHAT is a hash of what the arrays are of,
STATE one of all that they depend on: another state is another file, and the old one goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save

logger = logging.getLogger(__name__)

Make = Callable[[BinaryIO], tuple[dict[str, np.ndarray], dict[str, Any]]]
"""Writes text, and gives arrays and what else is to be known (JSON-able)."""


@dataclass(frozen=True)
class Kept:
    """What `keep` made, or found."""

    arrays: Mapping[str, np.ndarray]  # read-only
    about: dict[str, Any]
    text: str  # name of the file of text


def keep(what: Any, state: Any, make: Make, valid: Callable[[dict[str, Any]], bool] = lambda about: True) -> Kept:
    """What `make` gives, from the cache where it is there; one process at a time makes it.

    Args:
        what: JSON-able: what it is of, and who made it.
        state: JSON-able: all that it depends on. Where this differs it is made anew.
        valid: whether what is kept may be used; told what else is known of it.
    """
    directory = _directory()
    name = f"{_hash(what)}-{_hash(state)}"
    with _locked(directory / f"{name[:2]}.lock"):
        file = directory / f"{name}.arrays"
        found = _read(file)
        if found is not None and valid(found.about):
            return found
        # The old text goes with the old arrays: another process may be reading them, and keeps what it has open.
        for old in directory.glob(f"{_hash(what)}-*"):
            old.unlink(missing_ok=True)
        text = directory / f".partial-{uuid.uuid4().hex[:12]}"
        try:
            with text.open("xb") as stream:
                arrays, about = make(stream)
                stream.flush()
                os.fsync(stream.fileno())
            text.replace(file.with_suffix(".text"))
            metadata = {"about": json.dumps({**about, "bytes": file.with_suffix(".text").stat().st_size})}
            with text.open("xb") as stream:
                stream.write(save({key: np.ascontiguousarray(value) for key, value in arrays.items()}, metadata))
                stream.flush()
                os.fsync(stream.fileno())
            text.replace(file)
        finally:
            text.unlink(missing_ok=True)
        made = _read(file)
        if made is None:
            raise OSError(f"{file} was written, but is not whole: is the disk well?")
        return made


def found(what: Any, state: Any) -> Kept | None:
    """What `keep` would find, or None."""
    return _read(_directory() / f"{_hash(what)}-{_hash(state)}.arrays")


def _read(file: Path) -> Kept | None:
    """None for one that is not there, or not whole."""
    text = file.with_suffix(".text")
    try:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + size])
        about = json.loads(header.pop("__metadata__")["about"])
        if text.stat().st_size != about["bytes"]:
            return None
        arrays = {name: _array(mapped, 8 + size, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Kept(arrays, about, str(text))


DTYPES = {"I64": np.int64, "I32": np.int32, "U8": np.uint8, "U64": np.uint64, "BOOL": np.bool_}


def _array(mapped: mmap.mmap, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    first, last = entry["data_offsets"]
    if start + last > len(mapped):
        raise ValueError("cut off")
    dtype = np.dtype(DTYPES[entry["dtype"]])
    flat = np.frombuffer(mapped, dtype, (last - first) // dtype.itemsize, start + first)
    return flat.reshape(entry["shape"])


def _directory() -> Path:
    """The cache, or a directory that is gone when this process ends."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(os.environ.get("DISTILVLM_CACHE") or Path(home) / "distilvlm") / "data"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        logger.warning(
            "%s can't be written (%s): what is known of data is not kept; set DISTILVLM_CACHE", directory, error
        )
        return Path(_temporary().name)


def _temporary() -> Any:
    if "directory" not in _made:
        _made["directory"] = tempfile.TemporaryDirectory(prefix="distilvlm-")
    return _made["directory"]


_made: dict[str, Any] = {}


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("a") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: several may make the same, and the last one stays
            logger.info("%s can't be locked", file)
        yield


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
