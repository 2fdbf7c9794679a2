"""Micro-batches of one rank, from any update on; what was done before is neither read nor decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from distilvlm.data.batch import Batch
from distilvlm.data.collate import collate
from distilvlm.data.dataset import StageData
from distilvlm.data.problems import DataError
from distilvlm.data.sampler import Order, SampleIndex, shares


def batches(
    data: StageData,
    order: Order,
    first_update: int,
    last_update: int,
    rank: int = 0,
    world: int = 1,
    micro_batch: int = 1,
    workers: int = 0,
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield (update, this rank's micro-batches) for the updates `first_update` ... `last_update` - 1.

    The list is empty where the rank has no share of an update. With `workers` the same batches are made in that many
    processes, which live until the last update. No global generator is drawn from.

    Raises:
        DataError: a sample can't be loaded (names it), or a loader process died (names the samples it may have had).
    """
    if order.samples != len(data):
        raise ValueError(f"the order is for {order.samples} samples, the data has {len(data)}")
    if not workers:
        for update in range(first_update, last_update):
            wanted = shares(order.update(update), world, micro_batch)[rank]
            yield update, [collate([data[at] for at in samples]) for samples in wanted]
        return
    plan = _Plan(order, first_update, last_update, rank, world, micro_batch)
    loader = DataLoader(
        data,
        batch_sampler=plan,  # type: ignore[arg-type]  (any iterable of lists will do)
        num_workers=workers,
        collate_fn=collate,
        # The loader seeds its processes from a generator: without its own it would draw from the global one.
        generator=torch.Generator().manual_seed(0),
    )
    made = iter(loader)
    for update in range(first_update, last_update):
        count = len(shares(order.update(update), world, micro_batch)[rank])
        yield update, [_next(made, plan, data) for _ in range(count)]


class _Plan:
    """The micro-batches that the loader processes work through, in order, and which of them are under way."""

    def __init__(self, order: Order, first: int, last: int, rank: int, world: int, micro_batch: int) -> None:
        self.order = order
        self.updates = range(first, last)
        self.rank = rank
        self.world = world
        self.micro_batch = micro_batch
        self.under_way: deque[list[SampleIndex]] = deque()

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        for update in self.updates:
            for samples in shares(self.order.update(update), self.world, self.micro_batch)[self.rank]:
                self.under_way.append(samples)
                yield samples


def _next(made: Iterator[Batch], plan: _Plan, data: StageData) -> Batch:
    try:
        batch = next(made)
    except DataError:
        raise
    except RuntimeError as error:
        # torch says so when a process was killed (out of memory, say); it does not say what it was doing.
        keys = [data.record(index).key for samples in plan.under_way for _, index in samples]
        rows = ", ".join(f"{key.file} row {key.row}" for key in keys)
        raise DataError(f"a loader process died; it was at one of these: {rows}. {error}") from error
    plan.under_way.popleft()
    return batch
