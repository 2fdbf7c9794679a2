"""One record, ready to be collated: a sequence, or the two sequences of a preference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distilvlm.data.batch import CHOSEN, IGNORED, MISMATCHED, REJECTED, BadRow, SampleKey
from distilvlm.data.identity import Identity
from distilvlm.data.records import Record
from distilvlm.data.template import SAFE_ID


@dataclass(frozen=True)
class Sample:
    """One row, ready to be collated."""

    key: SampleKey
    input_ids: Tensor  # [length] int64
    labels: Tensor  # [length] int64, not shifted
    placeholder_positions: Tensor  # [pictures * placeholders] int64
    visual_positions: Tensor  # [visual] int64: the placeholders that are no registers
    placeholders: int  # per picture
    pictures: Tensor | None = None  # [pictures, 3, size, size] uint8
    features: Tensor | None = None  # [pictures, placeholders, d_vision]
    canvases: Tensor | None = None  # [pictures, 3, side, side] uint8, larger ones of the same pictures for encoders
    seen: Mapping[str, Tensor] | None = None  # what encoders saw, each [pictures, ...]
    weight: float = 1.0
    bad: tuple[BadRow, ...] = ()
    role: int | None = None  # of a preference: CHOSEN, REJECTED or MISMATCHED
    reference: float | None = None  # log-probability that the reference gives to the answer, where it is known
    second: Sample | None = None  # of a preference: its other sequence, about the same pictures
    teacher: Sample | None = None  # the same record as a teacher of other tokens or pictures reads it
    paired: Tensor | None = None  # [length] bool, beside `teacher`: labels that have a partner among its labels
    identity: Identity | None = None  # where what a teacher thinks of it is kept; None of a stand-in

    @property
    def sequences(self) -> tuple[Sample, ...]:
        return (self,) if self.second is None else (self, self.second)


def roles(record: Record) -> tuple[int, int]:
    """What the two sequences of a preference are."""
    if record.preferences == "pairs":
        return CHOSEN, REJECTED
    return (CHOSEN if record.desirable else REJECTED), MISMATCHED


def joined(record: Record, made: Sequence[Sample], reference: tuple[float, float] | None) -> Sample:
    """The sequences of a record as one sample."""
    if record.preferences is None:
        (sample,) = made
        return sample
    known = (None, None) if reference is None else reference
    first, second = (
        replace(one, role=role, reference=value) for one, role, value in zip(made, roles(record), known, strict=True)
    )
    return replace(first, second=second)


def stand_in(record: Record, placeholders: int, bad: tuple[BadRow, ...] = (), referred: bool = False) -> Sample:
    """One unlearned token of weight 0 (two sequences of it for a preference), so that every rank still makes its
    micro-batches.

    Args:
        referred: whether the samples beside it carry a reference.
    """
    none = torch.zeros(0, dtype=torch.int64)
    sample = Sample(
        key=record.key,
        input_ids=torch.tensor([SAFE_ID]),
        labels=torch.tensor([IGNORED]),
        placeholder_positions=none,
        visual_positions=none,
        placeholders=placeholders,
        weight=0.0,
    )
    made = joined(record, [sample] if record.preferences is None else [sample] * 2, (0.0, 0.0) if referred else None)
    return replace(made, bad=bad)
