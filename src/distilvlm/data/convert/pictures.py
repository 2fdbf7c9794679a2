"""Picture files of a source: which files are pictures, what is wrong with one, what it is by content."""

from __future__ import annotations

import functools
from pathlib import Path, PurePath

from distilvlm.data import geometry

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm", ".pgm"})


def is_picture(path: PurePath) -> bool:
    """By its suffix; whether it can be read is another question."""
    return path.suffix.lower() in SUFFIXES


class Pictures:
    """The pictures below one directory, each looked at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problem = functools.cache(self._problem)
        self.digest = functools.cache(self._digest)

    def _problem(self, name: str) -> str | None:
        """Why the picture can't be used, or None. Only its header is read."""
        path = self.root / name
        if not path.is_file():
            return f"no file {path}; mend the name, or say where the pictures are (images)"
        problem = geometry.problem(str(path))
        return None if problem is None else f"{problem}; put a whole picture there"

    def _digest(self, name: str) -> str:
        """SHA-256 of the file."""
        return geometry.content(str(self.root / name))
