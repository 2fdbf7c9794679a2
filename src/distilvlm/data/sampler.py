"""Which samples an update takes: a pure function of the update's number, whatever happened before."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

T = TypeVar("T")

SampleIndex = tuple[int, int]
"""(pass, index in the data). Pass p shows a sample for the p-th time: without weights it is the epoch."""


LANES = 16
"""Stretches of shards that are read side by side: processes take every so many-th sample, so up to 16 of them (2, 4, 8)
read shards of their own."""

WINDOW = 128
"""Samples of a stretch that are shuffled: with 16 stretches a sample is drawn from 2,048."""


def showings(samples: int, weight: float) -> int:
    """How many samples an epoch takes of a source: rounded up, so that two epochs of weight 0.5 show all of it."""
    return math.ceil(round(samples * weight, 6))


class Order:
    """The order of a stage's samples: every sample once per epoch, `batch` per update, the last of an epoch smaller.

    A source of weight 2 is seen twice per epoch, one of weight 0.5 by half, another half each time: its epochs are
    consecutive stretches of one endless series of shuffled passes over it.

    Args:
        samples: number of samples.
        batch: samples per update.
        seed: the recipe's seed.
        stage: name of the stage; two stages of a run have different orders.
        order: "random"; or "grouped": LLaVA-1.5's sampler, where an update holds samples of one modality, longest
            first, so that micro-batches (every world-th sample, see `shares`) hold rows of similar length, and what is
            left of both modalities makes the last update (or two) of an epoch; or "shards": for storage that is slow
            at random. Shards come in random order, cut into `LANES` stretches; every stretch is read from its front to
            its back, shuffled within `WINDOW` samples, and neighbours in the order are of neighbouring stretches.
        lengths: [samples] any measure of length; needed by "grouped".
        pictures: [samples] pictures per sample; needed by "grouped".
        blocks: [samples] the shard of each; needed by "shards".
        mixture: (number of samples, weight) of each source, in the order of the data; default: one of weight 1.
    """

    def __init__(
        self,
        samples: int,
        batch: int,
        seed: int,
        stage: str,
        order: Literal["random", "grouped", "shards"] = "random",
        lengths: np.ndarray | None = None,
        pictures: np.ndarray | None = None,
        mixture: Sequence[tuple[int, float]] | None = None,
        blocks: np.ndarray | None = None,
    ) -> None:
        if samples < 1 or batch < 1:
            raise ValueError(f"an order needs samples and a batch of at least 1, got {samples} and {batch}")
        if order == "grouped" and (lengths is None or pictures is None or not len(lengths) == len(pictures) == samples):
            raise ValueError(f"order 'grouped' needs the length and the number of pictures of all {samples} samples")
        if order == "shards" and (blocks is None or len(blocks) != samples):
            raise ValueError(f"order 'shards' needs the shard of all {samples} samples")
        self.mixture = [(samples, 1.0)] if mixture is None else list(mixture)
        if sum(count for count, _ in self.mixture) != samples:
            raise ValueError(f"the sources {self.mixture} do not have {samples} samples together")
        self.samples = samples
        self.per_epoch = sum(showings(count, weight) for count, weight in self.mixture)
        self.batch = batch
        self.order = order
        self._lengths = lengths
        self._pictures = pictures
        self._blocks = blocks
        self._entropy = (seed, int.from_bytes(hashlib.sha256(stage.encode()).digest()[:8], "big"))
        self._made: dict[int, np.ndarray] = {}  # epoch -> [per_epoch, 2] pass and index

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(self.per_epoch / self.batch)

    def total_updates(self, epochs: float | None = None, updates: int | None = None) -> int:
        """Updates of a stage of so many epochs (rounded up, as transformers' trainer does) or updates."""
        if updates is not None:
            return updates
        if epochs is None:
            raise ValueError("give the number of epochs or of updates")
        # 0.1 epochs of 30 updates are 3, although 0.1 * 30 is a little more in floating point.
        return max(1, math.ceil(round(epochs * self.updates_per_epoch, 6)))

    def update(self, number: int) -> list[SampleIndex]:
        """The samples of update `number` (0-based), in order."""
        epoch, place = divmod(number, self.updates_per_epoch)
        members = self._epoch(epoch)[place * self.batch : (place + 1) * self.batch]
        return [(int(showing), int(index)) for showing, index in members]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._made:
            if len(self._made) > 1:
                self._made.clear()
            shown = self._shown(epoch)
            self._made[epoch] = shown[self._shuffled(epoch, shown[:, 1])]
        return self._made[epoch]

    def _shown(self, epoch: int) -> np.ndarray:
        """[per_epoch, 2] pass and index of what `epoch` shows, source by source."""
        first = 0
        stretches: list[np.ndarray] = []
        for source, (count, weight) in enumerate(self.mixture):
            place, end = epoch * showings(count, weight), (epoch + 1) * showings(count, weight)
            while place < end:
                showing, start = divmod(place, count)
                stop = min(count, start + end - place)
                part = np.arange(count) if stop - start == count else self._pass(source, showing, count)[start:stop]
                stretches.append(np.stack([np.full(len(part), showing), first + part], axis=1))
                place += stop - start
            first += count
        return np.concatenate(stretches)

    def _pass(self, source: int, showing: int, count: int) -> np.ndarray:
        """[count] the order of one pass over a source, where an epoch takes but a part of it."""
        seeds = np.random.SeedSequence([*self._entropy], spawn_key=(source, showing))
        return np.random.Generator(np.random.Philox(seeds)).permutation(count)

    def _shuffled(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """[per_epoch] the places of `indices` in the order of `epoch`."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*self._entropy, epoch])))
        if self.order == "random":
            return rng.permutation(len(indices))
        if self.order == "shards":
            assert self._blocks is not None
            return _by_shards(self._blocks[indices], indices, rng)
        assert self._pictures is not None and self._lengths is not None
        pictures, lengths = self._pictures[indices], self._lengths[indices]

        def longest_first(group: np.ndarray) -> np.ndarray:
            return group[np.argsort(-lengths[group], kind="stable")]

        whole: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for members in (np.flatnonzero(pictures > 0), np.flatnonzero(pictures == 0)):
            shuffled = rng.permutation(members)
            end = len(shuffled) // self.batch * self.batch
            whole.extend(longest_first(group) for group in shuffled[:end].reshape(-1, self.batch))
            rest.append(shuffled[end:])
        last = rng.permutation(np.concatenate(rest))
        return np.concatenate(
            [
                *(whole[place] for place in rng.permutation(len(whole))),
                *(longest_first(last[start : start + self.batch]) for start in range(0, len(last), self.batch)),
            ]
        )


def shares(indices: Sequence[T], world: int) -> list[list[T]]:
    """An update's samples by rank: rank r takes every world-th sample from r on. There may be none left for some."""
    return [list(indices[rank::world]) for rank in range(world)]


def _by_shards(blocks: np.ndarray, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[samples] places in an order in which every LANES-th sample is near the one before it in the same shard.

    Args:
        blocks: [samples] the shard of each.
        indices: [samples] where each stands in its source.
    """
    count = len(blocks)
    shards, numbers = np.unique(blocks, return_inverse=True)
    read = np.lexsort((indices, rng.permutation(len(shards))[numbers]))  # one shard behind the other, each in order
    lane, place = np.divmod(np.arange(count), math.ceil(count / LANES))
    read = read[np.lexsort((rng.random(count), place // WINDOW, lane))]
    return read[np.lexsort((lane, place))]
