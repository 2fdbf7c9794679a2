"""Whether files are there, where many are asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

LISTED_FROM = 32
"""Files that are asked for in a directory one by one before all that is in it is listed."""

LARGEST = 2**18
"""Names that are listed in all, some 30 MB: files beyond these are asked for one by one again."""


class Listing:
    """The files below a directory. What is listed is looked at once, so it is for one pass over the rows of a source.

    Args:
        root: names are relative to it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._asked: dict[str, int] = {}  # directory -> files that were asked for
        self._names: dict[str, set[str]] = {}  # directory -> files in it, or some of them
        self._room = LARGEST

    def has(self, name: str) -> bool:
        cut = name.rfind("/") + 1
        directory, last = name[:cut], name[cut:]
        if last in self._names.get(directory, ()):
            return True
        asked = self._asked[directory] = self._asked.get(directory, 0) + 1
        if asked == LISTED_FROM:
            self._names[directory] = self._listed(directory)
        # One that came later, or stands behind the last name that there was room for.
        return "\0" not in name and os.path.isfile(self.root / name)  # noqa: PTH113 (half of pathlib's time)

    def _listed(self, directory: str) -> set[str]:
        found: set[str] = set()
        try:
            with os.scandir(self.root / directory) as entries:
                for entry in entries:
                    if len(found) >= self._room:
                        break
                    if entry.is_file():
                        found.add(entry.name)
        except (OSError, ValueError):  # no directory; or a name that no file has
            pass
        self._room -= len(found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"])
