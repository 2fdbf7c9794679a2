"""How far a teacher in 8 or 4 bits is from the same weights in bf16: measured on a few records, told at every start.

With p and q the distributions of a row, H their entropies and s the student's log-probabilities there,

    |KL(p ‖ s) − KL(q ‖ s)| = |Σ (p − q) s + H(p) − H(q)| ≤ d (max s − min s) + |H(p) − H(q)|,  d = ½ Σ |p − q|,

since Σ (p − q) is 0. It holds for whatever the student becomes; the mean over rows bounds the mean of a loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from distilvlm.data import StageData
from distilvlm.data.batch import Batch
from distilvlm.data.collate import collate
from distilvlm.models import forward
from distilvlm.models.files import write_whole
from distilvlm.models.shards import read_json
from distilvlm.recipe import Recipe

from .loading import weights_of
from .local import LocalTeacher, hidden_rows
from .reduced import log_probabilities

LOOKED_AT = 2
"""Records of each stage: hundreds of rows where there are pictures, and the unquantised model may run on the CPU."""


@dataclass(frozen=True)
class Apart:
    """Two teachers' distributions of the same rows: their distance (½ Σ |p − q|) and how far their entropies are apart,
    in nats; mean over rows, and of the row that has most."""

    rows: int
    distance: float
    most_distance: float
    entropy: float
    most_entropy: float

    def bound(self, spread: float) -> float:
        """By how much, at most, the mean forward KL of these rows differs for a student whose log-probabilities of a
        row lie within `spread` nats."""
        return self.distance * spread + self.entropy


def apart(first: Tensor, second: Tensor) -> Apart:
    """first, second: log-probabilities, [rows, vocab]."""
    p, q = first.double().exp(), second.double().exp()
    distance = (p - q).abs().sum(-1) / 2
    entropy = ((p * first).sum(-1) - (q * second).sum(-1)).abs()
    return Apart(len(p), *(float(value) for one in (distance, entropy) for value in (one.mean(), one.max())))


def looked_at(recipe: Recipe, data: Mapping[str, StageData]) -> list[Batch]:
    """A few records of each stage that needs the teacher, spread over its data."""
    found: list[Batch] = []
    for stage in recipe.stages:
        if stage.loss.needs_teacher and stage.name in data:
            rows = data[stage.name]
            count = min(LOOKED_AT, len(rows))
            found.append(collate([rows[0, place * len(rows) // count] for place in range(count)]))
    return found


@torch.no_grad()
def measure(recipe: Recipe, teacher: LocalTeacher, data: Mapping[str, StageData]) -> Apart:
    """Compare a quantised teacher with its own weights in bf16, which are loaded once more, onto the CPU.

    Args:
        data: stage -> what it trains on, with pictures.
    """
    exact, found = weights_of(recipe), list[Apart]()
    head = forward.head_weight(exact.model).to(teacher.device)
    for batch in looked_at(recipe, data):
        read = (batch.teacher or batch).to(teacher.device)
        rows = torch.unique(torch.cat([read.response_rows, read.visual_rows]))
        features = None
        if read.pictures is not None:  # of one tower for both: it is not quantised
            features = forward.vision_features(teacher.vlm.model, teacher.vlm.layout, read.pictures)
        ours = hidden_rows(teacher.vlm, read, None, rows, features)
        given = None if features is None else features.cpu()
        theirs = hidden_rows(exact, read.to("cpu"), None, rows.cpu(), given).to(teacher.device)
        pairs = zip(log_probabilities(theirs, head), log_probabilities(ours, teacher.head), strict=True)
        found += [apart(p, q) for p, q in pairs]
    return _joined(found)


def _joined(found: list[Apart]) -> Apart:
    rows = sum(one.rows for one in found)
    mean = lambda name: sum(one.rows * getattr(one, name) for one in found) / max(1, rows)  # noqa: E731
    most = lambda name: max((getattr(one, name) for one in found), default=0.0)  # noqa: E731
    return Apart(rows, mean("distance"), most("most_distance"), mean("entropy"), most("most_entropy"))


def kept(file: Path, recipe: Recipe, teacher: LocalTeacher, data: Mapping[str, StageData]) -> Apart:
    """What `measure` gave when it was asked last time, kept in `file`."""
    if not (known := read_json(file, {})):
        known = asdict(measure(recipe, teacher, data))
        write_whole(file, (json.dumps(known, indent=1) + "\n").encode())
    return Apart(**known)


def told(precision: str, found: Apart) -> str:
    """For people."""
    return (
        f"the teacher in {precision}, over {found.rows:,} rows of a few records: {found.distance:.2g} of a row's "
        f"probability is elsewhere than in bf16 (at most {found.most_distance:.2g}), and entropies are "
        f"{found.entropy:.2g} nats apart (at most {found.most_entropy:.2g}). A forward KL differs by at most "
        f"{found.entropy:.2g} + {found.distance:.2g} for each nat between a row's likeliest and unlikeliest id to the "
        "student, on average over these rows"
    )
