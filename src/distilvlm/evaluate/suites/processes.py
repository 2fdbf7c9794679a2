"""This process among those that share the asking (torchrun's)."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

PATIENCE = datetime.timedelta(days=7)
"""Some wait while others still ask: the usual half an hour is less than a large suite takes."""


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, numbers: Sequence[int]) -> list[int]:
        """Every world-th of them: neighbours are alike in length, so everybody has as much to do."""
        return list(numbers[self.rank :: self.world])

    def wait(self) -> None:
        """Returns when every process has called it."""
        if self.world > 1:
            distributed.barrier()

    def all(self, own: Any) -> list[Any]:
        """What every process gives here, in order of their ranks."""
        if self.world == 1:
            return [own]
        each: list[Any] = [None] * self.world
        distributed.all_gather_object(each, own)
        return each


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes of this launch; alone without a launcher. A group that is there already is used."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    made = not distributed.is_initialized()
    if made:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), world)
    finally:
        if made:
            distributed.destroy_process_group()


def device() -> torch.device:
    """A card for each process of a machine, where there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
