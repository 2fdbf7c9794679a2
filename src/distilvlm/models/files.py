"""Files and directories that are either whole or not there, whatever kills the process that writes them.

A file or directory is built beside its place under a name that starts with `.partial-`, forced to the disk (fsync)
and renamed. A directory also carries `manifest.json`, written last, with the size and SHA-256 of every file in it, so
that a reader can tell a whole one from one that lost something later. What a killed process leaves behind is
recognisable by name; `sweep` clears it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARTIAL = ".partial-"
REPLACED = ".replaced-"
"""Prefix of a directory that stepped aside for its successor: put back by `sweep` if that one never arrived."""


def write_whole(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file so that at any moment `path` is the old file or the new one, never a part.

    `content` is the bytes, or a function that writes the file whose path it is given (which ends in the same name).
    """
    path = Path(path).absolute()
    with naming(path):
        _make(path.parent)
        partial = _beside(path)
        try:
            if isinstance(content, bytes):
                partial.write_bytes(content)
                whole = partial
            else:
                # A directory around it: what writes it may have a temporary file of its own beside it, as safetensors.
                partial.mkdir()
                whole = partial / path.name
                content(whole)
                whole.chmod(partial.stat().st_mode & 0o666)  # safetensors' are for their owner only
            _sync(whole)
            whole.replace(path)
            if whole != partial:
                partial.rmdir()
        except BaseException:
            _discard(partial)
            raise
        _sync(path.parent)


@contextmanager
def directory_whole(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Give an empty directory to write into; when the block ends, it becomes `path`, with its manifest.

    A block that raises leaves nothing. An existing `path` is refused, or replaced if `replace`.
    """
    path = Path(path).absolute()
    with naming(path):
        _restore(path)
        if not replace:
            require_free(path)
        _make(path.parent)
        partial = _beside(path)
        aside = path.with_name(REPLACED + path.name)
        try:
            partial.mkdir()  # not mkdtemp: the result has the permissions of the user's umask
            yield partial
            manifest(partial)
            for folder, _, names in os.walk(partial, topdown=False):
                for name in names:
                    Path(folder, name).chmod(partial.stat().st_mode & 0o666)
                    _sync(Path(folder, name))
                _sync(Path(folder))
            if os.path.lexists(path):
                path.replace(aside)
            partial.replace(path)
        except BaseException:
            _discard(partial)
            with contextlib.suppress(OSError):  # the next one here tries again
                _restore(path)
            raise
        _sync(path.parent)
        remove(aside)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an error of the disk is an OSError that names `path`: that of a write names nothing, one of a temporary
    file what nobody knows, and safetensors' is of a kind of its own."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or PARTIAL in str(error.filename)):
            error.filename = str(path)
            if error.filename2 is not None:
                del error.filename2
        raise
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def require_free(path: str | Path) -> None:
    """Refuse a path at which something is: also before long work whose result shall go there."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} is there already: choose another directory or remove it")


def manifest(directory: str | Path) -> None:
    """Write `manifest.json`: size in bytes and SHA-256 of every other file below `directory`."""
    directory = Path(directory)
    files = {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != directory / MANIFEST
    }
    write_whole(directory / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1).encode())


def verify(directory: str | Path, contents: bool = True) -> list[str]:
    """What is wrong with a directory, one line per file; an empty list if it is whole.

    Files that the manifest does not name are nobody's business here. `contents=False` compares sizes only.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return [f"{directory}: no such directory"]
    try:
        expected = json.loads((directory / MANIFEST).read_bytes())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in expected.items()}
    except FileNotFoundError:
        return [f"{directory / MANIFEST}: missing, so the directory was never finished"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{directory / MANIFEST}: unreadable"]
    problems: list[str] = []
    for name, (size, digest) in expected.items():
        file = directory / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif file.stat().st_size != size:
            problems.append(f"{file}: {file.stat().st_size} bytes, the manifest says {size}")
        elif contents and sha256(file) != digest:
            problems.append(f"{file}: its content is not what was written")
    return problems


def sweep(directory: str | Path) -> list[str]:
    """Clear what killed processes left in `directory`, which no other process may be writing into; returns names."""
    swept: list[str] = []
    for entry in sorted(Path(directory).iterdir()) if Path(directory).is_dir() else []:
        if entry.name.startswith(REPLACED):
            swept.append(entry.name)
            _restore(entry.with_name(entry.name.removeprefix(REPLACED)))
        elif entry.name.startswith(PARTIAL):
            swept.append(entry.name)
            remove(entry)
    if swept:
        logger.info("%s: cleared what an interrupted process left: %s", directory, ", ".join(swept))
    return swept


def sha256(file: str | Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:12]}-{path.name}")


def _discard(partial: Path) -> None:
    """Take away what could not be finished, as far as the disk lets; `sweep` clears the rest."""
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _restore(path: Path) -> None:
    """Finish a replacement that was cut between its two renames: the old directory back, or away if the new is in."""
    aside = path.with_name(REPLACED + path.name)
    if not os.path.lexists(aside):
        return
    if os.path.lexists(path):
        remove(aside)
    else:
        aside.replace(path)


def remove(path: Path) -> None:
    """Remove a file or directory; killed halfway, nothing of it looks whole."""
    if path.is_dir() and not path.is_symlink():
        # Renamed first: a removal cut halfway must not look like a directory that only stepped aside.
        doomed = path if path.name.startswith(PARTIAL) else path.rename(_beside(path))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def _make(directory: Path) -> None:
    """mkdir -p whose new entries are on the disk."""
    if not directory.is_dir():
        _make(directory.parent)
        directory.mkdir(exist_ok=True)
        _sync(directory.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
