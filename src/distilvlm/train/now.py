"""Where a loop is: for who watches it from another thread, and for who looks into an update that went wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from distilvlm.data.batch import Batch


class Now:
    """What a loop does at this moment. Noting it is a few assignments, so it is done at every step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.moves = 0  # goes on as long as the loop does
        self.update = 0  # 1-based; 0 before the first
        self.micro_batch = 0  # 1-based, of this process
        self.doing = "begins"
        self.batch: Batch | None = None  # the last one that was worked on
        self.suspect: Batch | None = None  # the update's first one whose loss was not finite
        self._random: list[Tensor] = []

    def begin(self, update: int) -> None:
        """An update begins: its random numbers can be drawn again."""
        self.update, self.micro_batch, self.suspect = update, 0, None
        self._random = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(self._device))
        self.moves += 1

    def work(self, micro_batch: int, batch: Batch) -> None:
        self.micro_batch, self.batch = micro_batch, batch
        self.do("computes")

    def do(self, doing: str) -> None:
        self.doing = doing
        self.moves += 1

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within, random numbers are those of the update from its beginning; behind it, what they were before."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self._random[0])
            if devices:
                torch.cuda.set_rng_state(self._random[1], self._device)
            yield

    def __str__(self) -> str:
        place = f"update {self.update}" + (f", micro-batch {self.micro_batch}" if self.micro_batch else "")
        return f"{place}: {self.doing}"
