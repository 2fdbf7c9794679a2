"""Every write of a process under a directory, counted, and one of them failing: for a process of its own.

A write is a file opened for writing, what is written into it, an fsync, a renaming, a new directory, a safetensors file
as a whole. What other compiled code writes (a tokenizer's file) is not seen.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from safetensors import SafetensorError

How = Literal["once", "full", "kill"]
"""The write fails as on a full disk, and those behind it don't; these fail, too; the process is killed. Half of what
was to be written is there in each case."""


class Writes:
    """Counts; `fail_at` (from 1) is the one that fails."""

    def __init__(self, directory: Path, fail_at: int | None, how: How, log: Path) -> None:
        self._directory, self._fail_at, self._how, self._log = str(directory), fail_at, how, log.open("a")
        self.count = 0
        self._open, self._serialize = io.open, safetensors.torch.serialize_file
        io.open = builtins.open = self._opened  # type: ignore[assignment]
        safetensors.torch.serialize_file = self._serialized
        for name, path in (("fsync", 0), ("rename", 1), ("replace", 1), ("mkdir", 0)):
            setattr(os, name, self._counted(getattr(os, name), name, path))

    @property
    def first(self) -> bool:
        """Whether it is the chosen write that fails now, and not one behind it."""
        return self.count == self._fail_at

    @property
    def lives(self) -> bool:
        return self._how != "kill"

    def fails(self, what: str, path: Any) -> bool:
        """Whether this one does; labels go to the log. Raises nothing: what is to be half done is up to the caller."""
        path = str(Path(f"/proc/self/fd/{path}").readlink()) if isinstance(path, int) else os.fspath(path)
        if not str(path).startswith(self._directory):
            return False
        self.count += 1
        self._log.write(f"{what} {str(path).removeprefix(self._directory)}\n")
        self._log.flush()
        if self._fail_at is None or self._how == "full":
            return self._fail_at is not None and self.count >= self._fail_at
        return self.count == self._fail_at

    def end(self) -> OSError:
        """The error of a write that fails, if the process lives to see one."""
        if self._how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _counted(self, function: Any, name: str, at: int) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self.fails(name, arguments[at]):
                raise self.end()
            return function(*arguments, **options)

        return counted

    def _opened(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return self._open(file, mode, *arguments, **options)
        if self.fails("open", file):
            raise self.end()
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, options.get("encoding"), write_through=True)

    def _serialized(self, tensors: Any, file: Any, *arguments: Any, **options: Any) -> None:
        fails = self.fails("safetensors", file)
        self._serialize(tensors, file, *arguments, **options)
        if fails:
            os.truncate(file, Path(file).stat().st_size // 2)
            error = self.end()
            raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})")


class _Raw(io.FileIO):
    def __init__(self, writes: Writes, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._writes, self._full = writes, False

    def write(self, content: Any) -> int:
        if self._full:
            self._full = False
            raise self._writes.end()
        if not self._writes.fails("write", self.name):
            return super().write(content)
        # As a disk does it: what fits is written, and only the next call fails.
        written = super().write(memoryview(content)[: len(content) // 2]) if self._writes.first else 0
        self._full = self._writes.lives and written > 0
        if not self._full:
            raise self._writes.end()
        return written
