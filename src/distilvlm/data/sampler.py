"""Which samples an update takes: a pure function of the update's number, whatever happened before."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

T = TypeVar("T")

SampleIndex = tuple[int, int]
"""(epoch, index in the data)."""


class Order:
    """The order of a stage's samples: every sample once per epoch, `batch` per update, the last of an epoch smaller.

    Args:
        samples: number of samples.
        batch: samples per update.
        seed: the recipe's seed.
        stage: name of the stage; two stages of a run have different orders.
        order: "random", or "grouped": LLaVA-1.5's sampler, where an update holds samples of one modality, longest
            first, so that micro-batches (every world-th sample, see `shares`) hold rows of similar length. What is
            left of both modalities makes the last update (or two) of an epoch.
        lengths: [samples] any measure of length; needed by "grouped".
        pictures: [samples] pictures per sample; needed by "grouped".
    """

    def __init__(
        self,
        samples: int,
        batch: int,
        seed: int,
        stage: str,
        order: Literal["random", "grouped"] = "random",
        lengths: np.ndarray | None = None,
        pictures: np.ndarray | None = None,
    ) -> None:
        if samples < 1 or batch < 1:
            raise ValueError(f"an order needs samples and a batch of at least 1, got {samples} and {batch}")
        if order == "grouped" and (lengths is None or pictures is None or not len(lengths) == len(pictures) == samples):
            raise ValueError(f"order 'grouped' needs the length and the number of pictures of all {samples} samples")
        self.samples = samples
        self.batch = batch
        self.order = order
        self._lengths = lengths
        self._pictures = pictures
        self._entropy = (seed, int.from_bytes(hashlib.sha256(stage.encode()).digest()[:8], "big"))
        self._made: dict[int, np.ndarray] = {}

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(self.samples / self.batch)

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
        indices = self._epoch(epoch)[place * self.batch : (place + 1) * self.batch]
        return [(epoch, int(index)) for index in indices]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._made:
            if len(self._made) > 1:
                self._made.clear()
            self._made[epoch] = self._make_epoch(epoch)
        return self._made[epoch]

    def _make_epoch(self, epoch: int) -> np.ndarray:
        """[samples] all indices in the order of `epoch`."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*self._entropy, epoch])))
        if self.order == "random":
            return rng.permutation(self.samples)
        assert self._pictures is not None
        whole: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for members in (np.flatnonzero(self._pictures > 0), np.flatnonzero(self._pictures == 0)):
            shuffled = rng.permutation(members)
            end = len(shuffled) // self.batch * self.batch
            whole.extend(self._longest_first(group) for group in shuffled[:end].reshape(-1, self.batch))
            rest.append(shuffled[end:])
        last = rng.permutation(np.concatenate(rest))
        return np.concatenate(
            [
                *(whole[place] for place in rng.permutation(len(whole))),
                *(self._longest_first(last[start : start + self.batch]) for start in range(0, len(last), self.batch)),
            ]
        )

    def _longest_first(self, group: np.ndarray) -> np.ndarray:
        assert self._lengths is not None
        return group[np.argsort(-self._lengths[group], kind="stable")]


def shares(indices: Sequence[T], world: int, micro_batch: int) -> list[list[list[T]]]:
    """An update's samples as one list of micro-batches per rank: rank r takes every world-th sample from r on.

    Ranks may get unequal numbers of samples and of micro-batches; one without samples gets an empty list.
    """
    own = [indices[rank::world] for rank in range(world)]
    return [
        [list(samples[start : start + micro_batch]) for start in range(0, len(samples), micro_batch)] for samples in own
    ]
