"""How likely a model finds given text: log-probabilities of the tokens that are asked for, and of no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from distilvlm.data.template import SAFE_ID
from distilvlm.evaluate.generate import evaluating
from distilvlm.models.forward import head_weight, hidden_states
from distilvlm.models.vlm import VLM

_LOGITS = 2**24
"""Elements of a block of logits: 64 MB in fp32."""

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Passage:
    """Tokens, and the first of them whose probability is asked for: it and all that follow."""

    ids: tuple[int, ...]
    start: int  # at least 1: the first token has nothing to be predicted from


@dataclass(frozen=True)
class Likelihood:
    """What the tokens from `start` on are worth to a model."""

    total: float  # sum of their natural log-probabilities
    tokens: int


@dataclass(frozen=True)
class _Rows:
    """Right-padded text: behind a causal mask, padding changes nothing."""

    input_ids: Tensor  # [samples, length] int64
    attention_mask: Tensor  # [samples, length] int64
    placeholder_rows: Tensor  # [0] int64: no pictures
    sizes: None = None  # each is a line of its own


def likelihoods(
    vlm: VLM, passages: Sequence[Passage], *, batch_size: int = 16, progress: Progress | None = None
) -> list[Likelihood]:
    """The likelihood of each passage in the model's active workflow, in order; the same in batches of any size.

    Passages that differ in their last token only (a question's choices A, B, C, D) run through the model once: the last
    token is predicted, never read. Logits are built for predicted positions only, a block at a time, and
    log-probabilities in fp32, whatever the model's precision.

    Args:
        progress: called with the number of rows done and their total.

    Raises:
        ValueError: a passage without a token to predict, or with none to predict it from.
    """
    for passage in passages:
        if not 1 <= passage.start < len(passage.ids):
            raise ValueError(f"of {len(passage.ids)} tokens, those from {passage.start} on can't be predicted")
    asked: dict[tuple[int, ...], list[int]] = {}  # what the model reads -> passages that it predicts
    for number, passage in enumerate(passages):
        asked.setdefault(passage.ids[:-1], []).append(number)
    order = sorted(asked, key=len, reverse=True)
    found: dict[int, Likelihood] = {}
    with evaluating(vlm), torch.no_grad():
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            hidden = hidden_states(vlm.model, vlm.layout, _padded(batch, vlm.model.device), None)  # [rows, length, d]
            wanted = [(row, passages[number], number) for row, ids in enumerate(batch) for number in asked[ids]]
            places = [(row, place) for row, one, _ in wanted for place in range(one.start - 1, len(one.ids) - 1)]
            rows, columns = torch.tensor(places, device=hidden.device).unbind(dim=1)
            targets = torch.tensor([id for _, one, _ in wanted for id in one.ids[one.start :]], device=hidden.device)
            each = _log_probabilities(hidden[rows, columns], head_weight(vlm.model), targets)
            for (_, one, number), part in zip(
                wanted, each.split([len(one.ids) - one.start for _, one, _ in wanted]), strict=True
            ):
                found[number] = Likelihood(float(part.sum()), len(one.ids) - one.start)
            if progress is not None:
                progress(min(first + batch_size, len(order)), len(order))
    return [found[number] for number in range(len(passages))]


def _log_probabilities(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """[n] float64: of each target, from the hidden state [n, d] that predicts it."""
    parts: list[Tensor] = []
    block = max(1, _LOGITS // head.shape[0])
    for rows, wanted in zip(hidden.split(block), targets.split(block), strict=True):
        logits = functional.linear(rows, head).float()  # [block, V]
        chosen = logits.gather(1, wanted[:, None]).squeeze(1)
        parts.append((chosen - logits.logsumexp(dim=1)).double())
    return torch.cat(parts)


def _padded(batch: Sequence[Sequence[int]], device: torch.device) -> _Rows:
    ids = torch.full((len(batch), len(batch[0])), SAFE_ID, dtype=torch.int64)  # the longest comes first
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return _Rows(ids.to(device), mask.to(device), torch.empty(0, dtype=torch.int64, device=device))
