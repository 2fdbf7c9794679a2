"""Micro-batches of one rank, from any update on; what was done before is neither read nor decoded."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from distilvlm.data.batch import Batch
from distilvlm.data.collate import collate
from distilvlm.data.dataset import StageData
from distilvlm.data.grouping import Grouping
from distilvlm.data.sample import Sample
from distilvlm.data.sampler import Order, SampleIndex, shares
from distilvlm.data.workers import Workers


@dataclass(frozen=True)
class MicroBatches(Collection[Batch]):
    """One rank's share of an update. Each is made as it is asked for, once, so that an update need not be in memory as
    a whole, and begins before its last picture is decoded."""

    count: int
    made: Iterable[Batch]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.made)

    def __contains__(self, other: object) -> bool:
        return any(batch is other for batch in self.made)


def batches(
    data: StageData,
    order: Order,
    first_update: int,
    last_update: int,
    rank: int = 0,
    world: int = 1,
    grouping: Grouping | None = None,
    workers: int = 0,
) -> Iterator[tuple[int, MicroBatches]]:
    """Yield (update, this rank's micro-batches) for the updates `first_update` ... `last_update` - 1.

    There are none where the rank has no share of an update; what is left of them when the next update is asked for is
    passed over. With `workers` the same batches are made in that many processes, which live until the last update; one
    that dies is replaced (workers.py). No global generator is drawn from.

    Args:
        grouping: which samples go together; default: one by one.

    Raises:
        DataError: a sample can't be loaded (names it), or loader processes die again and again (names the samples that
            they may have had).
    """
    if order.samples != len(data):
        raise ValueError(f"the order is for {order.samples} samples, the data has {len(data)}")
    plan = _Plan(data, order, range(first_update, last_update), rank, world, grouping or Grouping())
    join = _Collate(plan.grouping.packed)
    if not workers:
        for update in plan.updates:
            wanted = plan.of(update)
            yield update, MicroBatches(len(wanted), (join([data[at] for at in samples]) for samples in wanted))
        return
    with Workers(data, plan, plan.under_way, join, workers, _outlive) as processes:
        for update in plan.updates:
            # What the loader asks the plan for ahead of time it does not ask twice.
            count = plan.counts.pop(update) if update in plan.counts else len(plan.of(update))
            own = (processes.next() for _ in range(count))
            yield update, MicroBatches(count, own)
            deque(own, maxlen=0)


def groups(
    data: StageData, order: Order, update: int, rank: int, world: int, grouping: Grouping
) -> list[list[SampleIndex]]:
    """Which samples are in each of a rank's micro-batches of an update."""
    return _Plan(data, order, range(update, update + 1), rank, world, grouping).of(update)


OUTLIVING = 300
"""Seconds that a loader process works on behind a signal to stop."""


def _outlive(process: int) -> None:
    """A job's end is sent to all of its processes, and who trains needs these until the update is finished."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: signal.alarm(OUTLIVING))


class _Collate:
    """A function that loader processes can be handed."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def __call__(self, samples: list[Sample]) -> Batch:
        return collate(samples, self.packed)


class _Plan:
    """The micro-batches that the loader processes work through, in order, and which of them are under way."""

    def __init__(
        self, data: StageData, order: Order, updates: range, rank: int, world: int, grouping: Grouping
    ) -> None:
        self.data = data
        self.order = order
        self.updates = updates
        self.rank = rank
        self.world = world
        self.grouping = grouping
        self.counts: dict[int, int] = {}  # update -> micro-batches, of updates that the loader was told of
        self.under_way: deque[list[SampleIndex]] = deque()

    def of(self, update: int) -> list[list[SampleIndex]]:
        """This rank's micro-batches of an update."""
        return self.grouping.split(shares(self.order.update(update), self.world)[self.rank], self.data.sequence_lengths)

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        for update in self.updates:
            wanted = self.of(update)
            self.counts[update] = len(wanted)
            for samples in wanted:
                self.under_way.append(samples)
                yield samples
