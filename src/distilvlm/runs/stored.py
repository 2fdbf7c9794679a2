"""Named tensors on disk that one process has written, or several, each the rows that it held; any part can be read."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .directory import RunError

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


def part(stem: str, process: int, processes: int) -> str:
    """The name of the file that a process writes; counted from 1, as published models' files are."""
    return f"{stem}-{process + 1:05d}-of-{processes:05d}.safetensors"


class Stored(contextlib.AbstractContextManager["Stored"]):
    """The tensors of `DIRECTORY/STEM.safetensors`, or of `DIRECTORY/STEM-00001-of-N.safetensors` and so on.

    A tensor's rows are those of the files one behind the other; one without dimensions is the same in each. Nothing is
    read but what is asked for.

    Raises:
        RunError: a file is missing.
    """

    def __init__(self, directory: Path, stem: str) -> None:
        whole = directory / f"{stem}.safetensors"
        files = [whole] if whole.exists() else sorted(directory.glob(f"{stem}-*-of-*.safetensors"))
        found = [_PART.search(file.name) for file in files]
        count = int(found[0][2]) if found and found[0] is not None else 1
        if [file.name for file in files] not in ([whole.name], [part(stem, i, count) for i in range(count)]):
            raise RunError(f"{directory} holds {len(files)} of {count} files of {stem}: restore it, or remove it")
        with contextlib.ExitStack() as opened:
            self._files: list[Any] = [opened.enter_context(safe_open(file, "pt")) for file in files]
            self._opened = opened.pop_all()
        self.names: set[str] = set(self._files[0].keys())

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        first, *others = (file.get_slice(name).get_shape() for file in self._files)
        if not first:
            return ()
        return (first[0] + sum(shape[0] for shape in others), *first[1:])

    def rows(self, name: str, wanted: slice) -> Tensor:
        """Rows of a tensor, as `wanted.start` and `wanted.stop` say; one without dimensions is given whole."""
        if not self.shape(name):
            return self._files[0].get_tensor(name)
        pieces: list[Tensor] = []
        before = 0  # rows in earlier files
        for file in self._files:
            piece = file.get_slice(name)
            count = piece.get_shape()[0]
            first, last = max(wanted.start - before, 0), min(wanted.stop - before, count)
            if first < last:
                pieces.append(piece[first:last])
            before += count
        if not pieces:
            return self._files[0].get_tensor(name)[:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
