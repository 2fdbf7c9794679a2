"""Which of a process's samples of an update go through the models together; the update is the same whichever do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distilvlm.data.collate import padded
from distilvlm.data.sampler import SampleIndex
from distilvlm.recipe.schema import MachineSpec, StageSpec

Lengths = Callable[[int], Sequence[int]]
"""Index of a sample to the positions of its sequence, or of both of a preference."""


@dataclass(frozen=True)
class Grouping:
    """So many samples, or as many as so many positions hold.

    Args:
        samples: of a micro-batch, at most; in the order of the update. Of no meaning beside `tokens`.
        tokens: positions of a micro-batch, at most, padding included: samples of similar length stand together, longest
            first. In a packed line there is no padding between samples, and any fit together: the longest first, each
            into the first line that has room (first-fit decreasing).
        packed: all samples of a micro-batch are one line.
    """

    samples: int = 1
    tokens: int | None = None
    packed: bool = False

    @staticmethod
    def of(machine: MachineSpec, stage: StageSpec) -> Grouping:
        """As a recipe has it; a stage of pictures alone has no positions to count or pack."""
        if stage.pictures_alone:
            return Grouping(machine.micro_batch)
        return Grouping(machine.micro_batch, machine.tokens, machine.packing)

    def positions(self, lengths: Sequence[int]) -> int:
        """Of a micro-batch of sequences of these lengths, as `collate` makes it."""
        return padded(sum(lengths)) if self.packed else len(lengths) * padded(max(lengths))

    def split(self, samples: Sequence[SampleIndex], lengths: Lengths) -> list[list[SampleIndex]]:
        """Micro-batches of one process, a function of its share of the update.

        Raises:
            ValueError: a sample takes more positions than a micro-batch has.
        """
        if self.tokens is None:
            return [list(samples[start : start + self.samples]) for start in range(0, len(samples), self.samples)]
        measured = [(tuple(lengths(index)), (showing, index)) for showing, index in samples]
        measured.sort(key=lambda one: -(sum(one[0]) if self.packed else max(one[0])))  # stable: in the update's order
        groups: list[tuple[list[int], list[SampleIndex]]] = []
        for own, sample in measured:
            if (alone := self.positions(own)) > self.tokens:
                raise ValueError(
                    f"sample {sample[1]} takes {alone:,} positions, and a micro-batch has {self.tokens:,}: set "
                    f"machine.tokens to {alone} or more"
                )
            # Padded, only the last can have room: those before it were full, or of longer samples.
            open_ones = groups if self.packed else groups[-1:]
            for group, members in open_ones:
                if self.positions([*group, *own]) <= self.tokens:
                    group.extend(own)
                    members.append(sample)
                    break
            else:
                groups.append((list(own), [sample]))
        return [members for _, members in groups]
