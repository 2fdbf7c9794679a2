"""`events.jsonl`: one JSON object a line, every term of every update.

A checkpoint remembers how long the file was, so continuing from it cuts off the updates that will be made again: every
update stands in the file exactly once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Events:
    """Appends events; only the main process holds one.

    Args:
        path: the file.
        keep: bytes to keep of what is there; the rest belongs to updates that will be made again.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self._file = path.open("ab")
        if self._file.tell() > keep:
            self._file.truncate(keep)
            self._file.seek(0, os.SEEK_END)

    def write(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": kind, **values}).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Force everything to the disk; returns the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a run; a last line that a kill cut off is left out."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
