"""`events.jsonl`: one JSON object a line, every term of every update.

A checkpoint remembers how long the file was, so continuing from it cuts off the updates that will be made again: every
update stands in the file exactly once. Nothing is read back from it: where its end was damaged, the run goes on, and
says what is missing.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import IO, Any

from distilvlm.models.files import naming

logger = logging.getLogger(__name__)


class Events:
    """Appends events; only the main process holds one.

    Args:
        path: the file.
        keep: bytes to keep of what is there; the rest belongs to updates that will be made again.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self._path = path
        with naming(path):
            self._file = path.open("a+b")
            there = self._file.tell()
            whole = _end_of_line(self._file, min(keep, there))
            if whole < keep:
                logger.warning("%s lacks the last %d bytes of what was written: events are missing", path, keep - whole)
            if whole < there:
                self._file.truncate(whole)
                self._file.seek(0, os.SEEK_END)

    def write(self, kind: str, **values: Any) -> None:
        with naming(self._path):
            self._file.write(json.dumps({"event": kind, **values}).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Force everything to the disk; returns the file's length in bytes."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


def _end_of_line(file: IO[bytes], end: int) -> int:
    """Where the last whole line within the first `end` bytes ends."""
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a run; a last line that a kill cut off is left out."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
