"""A disk that is full, read-only or broken: what the user is told; the look at free space before each checkpoint."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distilvlm.cost.numbers import as_bytes
from distilvlm.recipe import Recipe

from .directory import RunDirectory, RunError

FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
BROKEN = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)


class DiskError(RunError):
    """What a run writes to takes nothing more; the message says where, what is kept, and how to go on."""


@contextmanager
def explained(recipe: Recipe, place: RunDirectory) -> Iterator[None]:
    """Within, an error of the disks that the run writes to is a DiskError; others are left as they are."""
    try:
        yield
    except OSError as error:
        told = _told(error, recipe, place)
        if told is None:
            raise
        raise DiskError(told) from error


def require_room(file: Path, bytes: int, recipe: Recipe, place: RunDirectory) -> None:
    """Before something is written for minutes that there is no room for.

    Raises:
        DiskError: there is not.
    """
    free = _free(place.path)
    if free < bytes:
        raise DiskError(_full(f"{file} takes {as_bytes(bytes)}, {as_bytes(free)} are free", recipe, place))


def _told(error: OSError, recipe: Recipe, place: RunDirectory) -> str | None:
    """What is wrong and what to do; None where the error is none of these, or of a file that the run only reads."""
    file = None if error.filename is None else Path(error.filename).absolute()
    roots = [place.path, *(Path(path).absolute() for path in _stores(recipe))]
    root = next((one for one in roots if file and (file.is_relative_to(one) or one.is_relative_to(file))), None)
    if error.errno in FULL:
        where = place.path if file is None else file
        quota = ", and a quota is used up" if error.errno == errno.EDQUOT else ""
        return _full(f"{where}: {error.strerror} ({as_bytes(_free(where))} are free{quota})", recipe, place)
    if root is None:
        return None
    if error.errno in READ_ONLY:
        return (
            f"can't write to {root}: {error.strerror} ({file}). {_kept(recipe, place)} Make it writable for this user, "
            f"or copy {place.path} to another disk and give that by --dir; then the same command continues"
        )
    if error.errno in BROKEN:
        return (
            f"the disk of {root} fails: {error.strerror} ({file}). {_kept(recipe, place)} When it is there again, or "
            f"{place.path} was copied to another one and given by --dir, the same command continues"
        )
    return None


def _full(what: str, recipe: Recipe, place: RunDirectory) -> str:
    return (
        f"no room: {what}. {_kept(recipe, place)} Free some space, or keep fewer checkpoints (machine.keep=1), or move "
        f"{place.path} to a larger disk and give it by --dir; then the same command continues"
    )


def _kept(recipe: Recipe, place: RunDirectory) -> str:
    try:
        return f"Kept: {place.kept(recipe)}."
    except OSError:
        return "What is kept can't be read either."


def _stores(recipe: Recipe) -> list[str]:
    """Where else a run writes to."""
    found = [recipe.pictures.features, None if recipe.cache is None else recipe.cache.path]
    found.append(None if recipe.teacher is None or recipe.teacher.kind != "cached" else recipe.teacher.keep.path)
    return [path for path in found if path is not None]


def _free(path: Path) -> int:
    return shutil.disk_usage(next(one for one in (path, *path.parents) if one.exists())).free
