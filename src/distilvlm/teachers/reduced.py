"""A teacher's distributions as far as they are kept where hidden rows take too much room: likeliest ids, or draws.

Likeliest ids are compared with one more event, all other ids together. For a student of which the ids that are not kept
have logits within `r` of each other, the divergence of a row is then less than the exact one by at most
t · (ln n + r), with t the teacher's mass on these n ids (`rest_bound`): the part of KL that is within them.

Drawn ids are each as likely as the teacher has it, so that cross-entropies and their gradients are right on average
over draws (random sampling knowledge distillation, arXiv 2503.16870 §3); divergences are above by the entropy that a
few draws do not show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from distilvlm.losses.sparse import Sparse

ROWS = 64
"""Rows of which logits over the whole vocabulary are held at a time."""


def likeliest(hidden: Tensor, head: Tensor, kept: int) -> dict[str, Tensor]:
    """The `kept` likeliest ids of each row: ids [rows, kept] int32 and log-probabilities [rows, kept] fp32.

    hidden: [rows, d]; head: [vocab, d], of the ids that are compared. Products run in the dtype of the head, or in
    autocast's, as in the loss head.
    """
    kept = min(kept, head.shape[0])
    found = [logs.topk(kept) for logs in log_probabilities(hidden, head)]
    if not found:
        return {"ids": torch.zeros(0, kept, dtype=torch.int32), "log_probabilities": torch.zeros(0, kept)}
    ids = torch.cat([one.indices for one in found]).to("cpu", torch.int32)
    return {"ids": ids, "log_probabilities": torch.cat([one.values for one in found]).to("cpu", torch.float32)}


def drawn(hidden: Tensor, head: Tensor, draws: int, key: str) -> dict[str, Tensor]:
    """Ids drawn from each row's distribution: ids [rows, draws] int32, sorted; arguments as `likeliest`.

    Args:
        key: hexadecimal; the same key draws the same.
    """
    generator = torch.Generator().manual_seed(int(key[:15], 16))
    found = [
        torch.multinomial(logs.to("cpu", torch.float64).exp(), draws, replacement=True, generator=generator)
        for logs in log_probabilities(hidden, head)
    ]
    ids = torch.cat(found) if found else torch.zeros(0, draws)
    return {"ids": ids.sort(-1).values.to(torch.int32)}


def restored(kept: dict[str, Tensor]) -> Sparse:
    """What `likeliest` or `drawn` kept, as a loss compares with it."""
    ids = kept["ids"].to(torch.int64)
    if "log_probabilities" in kept:
        return Sparse(ids, kept["log_probabilities"], tail=True)
    rows, draws = ids.shape
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = first.cumsum(-1) - 1  # of each draw among its row's different ids
    counts = torch.zeros(rows, draws).scatter_add_(-1, place, torch.ones(rows, draws))
    different = torch.full_like(ids, -1).scatter_(-1, place, ids)
    most = int(place.max()) + 1 if ids.numel() else 0
    return Sparse(different[:, :most], (counts[:, :most] / draws).log(), tail=False)


def rest(kept: Tensor) -> Tensor:
    """[rows] the mass of all ids but those kept; `kept`: their log-probabilities, [rows, kept]."""
    return (1 - kept.double().exp().sum(-1)).clamp_min(0)


def rest_bound(mass: float, ids: int, spread: float = 0.0) -> float:
    """By how much, at most, a row's forward KL over likeliest ids and the rest is below the exact one, in nats.

    Args:
        mass: of the teacher on the rest.
        ids: in the rest.
        spread: largest minus smallest logit that the student has there.
    """
    return mass * (math.log(max(1, ids)) + spread)


def log_probabilities(hidden: Tensor, head: Tensor) -> Iterator[Tensor]:
    """fp32, [ROWS, vocab] at most at a time."""
    for some in hidden.split(ROWS) if len(hidden) else ():
        logits = torch.nn.functional.linear(some.to(head.dtype), head)
        yield torch.log_softmax(logits, -1, dtype=torch.float32)
