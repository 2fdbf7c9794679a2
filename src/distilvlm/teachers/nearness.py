"""How far losses of a cached teacher may be from a local one's: measured while it is filled, and told at every start.

A log-probability that is off by at most ε changes a row's forward KL by at most (eᵋ − 1)(CE + H) + ε eᵋ, with CE the
cross-entropy of teacher and student and H the teacher's entropy (`changed_by`): each of the teacher's probabilities
changes by a factor of at most eᵋ, and so do both parts of KL = CE − H, beside the logarithm within H.
"""

from __future__ import annotations

import json
import math

import torch

from distilvlm.data.collate import collate
from distilvlm.models.files import write_whole
from distilvlm.models.shards import about_shard, read_json

from .cache import Asked, TeacherCache
from .cached import CachedTeacher
from .reduced import rest_bound


def measure(cache: TeacherCache, asked: Asked, micro_batch: int) -> None:
    """Note the largest difference, in nats, between log-probabilities that hidden rows from the cache give and those of
    a local teacher, which sees records from all over the data in one micro-batch."""
    if cache.keep.responses != "hidden":
        return
    every = list(dict.fromkeys(asked.records.values()))
    count = min(micro_batch, len(every))
    records = [every[place * len(every) // count] for place in range(count)]
    teacher = cache.teacher()
    batch = collate([record.data[0, record.index] for record in records]).to(cache.student_device)
    rows = batch.response_rows
    shown = [key for one in batch.identities if one is not None for key in one.pictures]
    if cache.keep.visual == "hidden" and all(key in asked.records for key in shown):
        rows = torch.unique(torch.cat([rows, batch.visual_rows]))
    with torch.no_grad(), cache.keeping.cast(cache.student_device):
        logs: list[torch.Tensor] = []
        for one in (teacher, CachedTeacher(cache)):
            hidden = one.targets(batch, rows, None).hidden
            assert hidden is not None
            logits = torch.nn.functional.linear(hidden.to(teacher.head.dtype), teacher.head.to(hidden.device))
            logs.append(torch.log_softmax(logits, -1, dtype=torch.float32))
    most = float((logs[0] - logs[1]).abs().max()) if logs[0].numel() else 0.0
    file = cache.directory / "nearness.json"
    write_whole(file, json.dumps(read_json(file, {}) | {str(micro_batch): most}, indent=1).encode())


def measured(cache: TeacherCache, micro_batch: int) -> float | None:
    """What `measure` noted for micro-batches of this size."""
    return read_json(cache.directory / "nearness.json", {}).get(str(micro_batch))


def changed_by(difference: float, cross_entropy: float, entropy: float) -> float:
    """By how much, at most, a row's forward KL changes where log-probabilities of the teacher's are off by
    `difference`; all in nats."""
    return math.expm1(difference) * (cross_entropy + entropy) + difference * math.exp(difference)


def left_out(cache: TeacherCache) -> tuple[float, float] | None:
    """Mean and largest mass of a row that kept ids leave out; None where no row was kept so."""
    places = [cache.store.place(i) for i in range(len(cache.store.shards()))]
    found = [about_shard(place)["rest"] for place in places if place.exists()]
    rows = sum(one["rows"] for one in found)
    return (sum(one["sum"] for one in found) / rows, max(one["most"] for one in found)) if rows else None


def told(cache: TeacherCache, micro_batch: int) -> list[str]:
    """For people."""
    lines: list[str] = []
    if (most := measured(cache, micro_batch)) is not None:
        lines.append(
            f"the cached teacher's log-probabilities are within {most:.2g} nats of a local one's in micro-batches of "
            f"{micro_batch} (measured on one): a row's divergence changes by less than {changed_by(most, 1, 0):.2g} + "
            f"{math.expm1(most):.2g} for each further nat of cross-entropy and entropy"
        )
    if (left := left_out(cache)) is not None:
        kept = min(cache.keep.top_k, cache.keeping.common)
        bound = rest_bound(left[0], cache.keeping.common - kept)
        lines.append(
            f"the {kept} likeliest ids leave out {left[0]:.2g} of the teacher's mass (at most {left[1]:.2g} of a row): "
            f"loss.response is at most {bound:.2g} nats below the exact one, and {left[0]:.2g} more for each nat that "
            "the student's logits of the other ids are apart"
        )
    return lines
