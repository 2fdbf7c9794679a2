"""Samples become a micro-batch; every row set is named here, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from distilvlm.data.batch import IGNORED, Batch
from distilvlm.data.sample import Sample
from distilvlm.data.template import SAFE_ID

STEP = 16
"""Lengths that micro-batches come in: few different sizes of tensors are freed and taken again as they are, where
hundreds leave a C library's heap in pieces (60 updates of up to 205 positions held 5.1 GB on a CPU, 3.6 so)."""


def padded(length: int) -> int:
    """The length of a micro-batch whose longest sample has `length` positions; short ones stay as they are."""
    return length if length <= 2 * STEP else -(-length // STEP) * STEP


def collate(samples: Sequence[Sample], packed: bool = False) -> Batch:
    """Right-padded to `padded` of the longest sequence. The two sequences of a preference stand next to each other.

    Args:
        packed: all sequences in one line, which is padded behind the last.

    Raises:
        ValueError: a row whose placeholders are not those of its own pictures (names it). Llava itself only compares
            the totals of a batch, and rows of 15 and 17 would leak into each other. Also preferences beside plain
            samples, or preferences with a reference beside some without.
    """
    _check_kinds(samples)
    samples = [sequence for sample in samples for sequence in sample.sequences]
    sizes = [len(sample.input_ids) for sample in samples]
    length = padded(sum(sizes) if packed else max(sizes))
    shape = (1 if packed else len(samples), length)
    starts = _starts(samples, length, packed)
    input_ids = torch.full(shape, SAFE_ID).flatten()
    attention_mask = torch.zeros(shape, dtype=torch.int64).flatten()
    targets = torch.full(shape, IGNORED).flatten()
    placeholder_rows: list[Tensor] = []
    visual_rows: list[Tensor] = []
    for start, own, sample in zip(starts, sizes, samples, strict=True):
        _check_placeholders(sample)
        input_ids[start : start + own] = sample.input_ids
        attention_mask[start : start + own] = 1
        # Position t is asked for token t + 1, and the last of a sample for nothing.
        targets[start : start + own - 1] = sample.labels[1:]
        placeholder_rows.append(sample.placeholder_positions + start)
        visual_rows.append(sample.visual_positions + start)

    response_rows = (targets != IGNORED).nonzero().flatten()
    pictures = [sample.pictures for sample in samples if sample.pictures is not None]
    features = [sample.features for sample in samples if sample.features is not None]
    owners = [number for number, sample in enumerate(samples) for _ in range(_pictures(sample))]
    canvases = [sample.canvases for sample in samples if sample.canvases is not None]
    seen = [sample.seen for sample in samples if sample.seen is not None]
    batch = Batch(
        input_ids=input_ids.view(shape),
        attention_mask=attention_mask.view(shape),
        placeholder_rows=torch.cat(placeholder_rows),
        visual_rows=torch.cat(visual_rows),
        response_rows=response_rows,
        response_targets=targets[response_rows],
        weights=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        pictures=torch.cat(pictures) if pictures else None,
        features=torch.cat(features) if features else None,
        keys=tuple(sample.key for sample in samples),
        identities=tuple(sample.identity for sample in samples),
        bad=tuple(problem for sample in samples for problem in sample.bad),
        roles=_known([sample.role for sample in samples], torch.int64),
        reference=_known([sample.reference for sample in samples], torch.float64),
        owners=torch.tensor(owners) if owners else None,
        canvases=torch.cat(canvases) if canvases else None,
        seen={name: torch.cat([one[name] for one in seen]) for name in seen[0]} if seen else None,
        sizes=tuple(sizes) if packed else None,
    )
    return batch if all(sample.teacher is None for sample in samples) else _beside_teachers(batch, samples)


def _starts(samples: Sequence[Sample], length: int, packed: bool) -> list[int]:
    """The row that each sample begins with."""
    steps = [len(sample.input_ids) if packed else length for sample in samples]
    return list(accumulate(steps[:-1], initial=0))


def _beside_teachers(batch: Batch, samples: Sequence[Sample]) -> Batch:
    """The batch with the rows that the teacher reads of the same samples; a stand-in is read as it is."""
    packed = batch.sizes is not None
    teacher = collate([sample.teacher or sample for sample in samples], packed)
    if all(sample.teacher is None or sample.teacher.pictures is sample.pictures for sample in samples):
        teacher = replace(teacher, pictures=batch.pictures)  # one copy of what both see
    paired = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    for start, sample in zip(_starts(samples, batch.length, packed), samples, strict=True):
        if sample.paired is not None:
            paired[start : start + len(sample.paired) - 1] = sample.paired[1:]  # asked for by the positions before
    return replace(batch, teacher=teacher, paired=paired[batch.response_rows])


def _pictures(sample: Sample) -> int:
    return sum(tensor.shape[0] for tensor in (sample.pictures, sample.features) if tensor is not None)


def _known(values: Sequence[float | None], dtype: torch.dtype) -> Tensor | None:
    return None if values[0] is None else torch.tensor(values, dtype=dtype)


def _check_kinds(samples: Sequence[Sample]) -> None:
    for what, has in (
        ("holds a preference", [sample.second is not None for sample in samples]),
        ("has a reference", [sample.reference is not None for sample in samples]),
    ):
        if any(has) and not all(has):
            does, lacks = samples[has.index(True)].key, samples[has.index(False)].key
            raise ValueError(
                f"{does.file}, row {does.row} {what}, and {lacks.file}, row {lacks.row} in the same batch does not: "
                "a batch is of one kind"
            )
    lacks = [sample.key for sample in samples if sample.weight and sample.teacher is None]
    if lacks and len(lacks) < sum(1 for sample in samples if sample.weight):
        raise ValueError(
            f"{lacks[0].file}, row {lacks[0].row} has no row for the teacher, and others of its batch have"
        )


def _check_placeholders(sample: Sample) -> None:
    shown, twice = _pictures(sample), sample.pictures is not None and sample.features is not None
    if twice or len(sample.placeholder_positions) != shown * sample.placeholders:
        key = sample.key
        raise ValueError(
            f"{key.file}, row {key.row}: {len(sample.placeholder_positions)} placeholders for {shown} pictures of "
            f"{sample.placeholders} each"
        )
