"""One vector per picture out of an encoder: what k-NN and a probe work on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from distilvlm.data.geometry import Geometry, canvas, decode
from distilvlm.data.stage import background
from distilvlm.models.encoders import EncoderTeacher, Seen

Pooling = Literal["mean", "cls", "both"]
"""mean: of all patch tokens, which a VLM reads and a distillation compares; cls: the CLS token; both: one after the
other."""


class Vectors:
    """One encoder's vectors of pictures, each computed once however often it is asked for.

    Args:
        geometry: how pictures become canvases, as in the encoder's training.
        progress: called with the number of pictures seen and how many there are in this call.

    Raises:
        ValueError: CLS is asked for, and the encoder has none; when the first picture is seen.
    """

    def __init__(
        self,
        encoder: EncoderTeacher,
        geometry: Geometry = "square",
        pooling: Pooling = "mean",
        batch: int = 32,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        self._encoder, self._batch, self._progress = encoder, batch, progress
        self._geometry: Geometry = geometry
        self._pooling: Pooling = pooling
        self._known: dict[str, Tensor] = {}

    def of(self, paths: Sequence[str]) -> Tensor:
        """[pictures, d] float32 on the CPU.

        Raises:
            PictureError: names the picture that can't be read.
        """
        new = [path for path in dict.fromkeys(paths) if path not in self._known]
        done, padding = 0, background(self._encoder.view)
        for canvases in canvases_of(new, self._geometry, self._encoder.size, self._batch, padding):
            seen = self._encoder.see(self._encoder.pixels(canvases))
            rows = pooled(seen, self._pooling, self._encoder.name).cpu()
            self._known |= zip(new[done : done + len(rows)], rows, strict=True)
            done += len(rows)
            if self._progress is not None:
                self._progress(done, len(new))
        return torch.stack([self._known[path] for path in paths])


def canvases_of(
    paths: Sequence[str], geometry: Geometry, size: int, batch: int, padding: tuple[int, int, int]
) -> Iterator[Tensor]:
    """Batches of uint8 [pictures, 3, size, size], in order; threads decode the next one while this one is seen."""

    def load(path: str) -> Tensor:
        return canvas(decode(path), geometry, size, padding)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        starts = range(0, len(paths), batch)
        waiting = [threads.submit(load, path) for path in paths[:batch]]
        for start in starts:
            ready = [future.result() for future in waiting]
            waiting = [threads.submit(load, path) for path in paths[start + batch : start + 2 * batch]]
            yield torch.stack(ready)


def pooled(seen: Seen, pooling: Pooling, name: str) -> Tensor:
    """[pictures, d] float32 of what an encoder called `name` saw. Raises ValueError for CLS that it has not."""
    mean = seen.tokens.float().mean(1)
    if pooling == "mean":
        return mean
    if seen.cls is None:
        raise ValueError(f"encoder '{name}' has no CLS token to pool by '{pooling}': use 'mean'")
    return seen.cls.float() if pooling == "cls" else torch.cat([seen.cls.float(), mean], dim=1)
