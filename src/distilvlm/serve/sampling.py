"""Which token comes next: every row by its own temperature, nucleus and random numbers, whatever shares its batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import TokenLogprob

LIKELIEST = 512
"""Tokens among which a nucleus is looked for before the whole vocabulary is sorted."""


@dataclass(frozen=True)
class Draw:
    """How one row's tokens are drawn.

    Attributes:
        temperature: 0: the likeliest.
        numbers: gives one number per token; nobody else draws from it.
    """

    temperature: float
    top_p: float
    numbers: random.Random


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The next token of each row of `logits`, [rows, V]; those that may not be chosen are -inf."""
    chosen = logits.argmax(dim=-1)  # [rows]
    drawn = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if drawn:
        chosen[drawn] = _drawn(logits[drawn].float(), [draws[row] for row in drawn])
    return chosen.tolist()


def _drawn(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[rows] ids by the inverse of the distribution function, over ids in their order: rounding of the logits, which
    depends on the batch, then moves the borders between tokens by as little, where an order by probability would swap
    tokens."""
    temperatures = torch.tensor([draw.temperature for draw in draws], device=logits.device)[:, None]
    # The likeliest becomes 0 first, so that no temperature makes an infinite one.
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / temperatures).softmax(dim=-1)  # [rows, V]
    shares = torch.tensor([draw.top_p for draw in draws], device=logits.device)[:, None]
    if bool((shares < 1).any()):
        probabilities = _nucleus(probabilities, shares)
    reach = probabilities.cumsum(dim=-1, dtype=torch.float64)
    numbers = torch.tensor([draw.numbers.random() for draw in draws], dtype=torch.float64, device=logits.device)
    return torch.searchsorted(reach, numbers[:, None] * reach[:, -1:], right=True)[:, 0]


def _nucleus(probabilities: Tensor, shares: Tensor) -> Tensor:
    """Zero outside of the smallest set of likeliest tokens that have the share, [rows, 1], together. Tokens that are as
    likely as its last are in it, too: which of them come first, nothing says."""
    values = probabilities.topk(min(LIKELIEST, probabilities.shape[-1])).values
    if bool((values.sum(dim=-1, keepdim=True) < shares).any()):
        values = probabilities.sort(dim=-1, descending=True).values
    likelier = values.cumsum(dim=-1) - values
    last = ((likelier < shares).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return probabilities.where((probabilities >= values.gather(-1, last)) | (shares >= 1), 0.0)


def logprob(logits: Tensor, token: int, likeliest: int, text: Callable[[int], str]) -> TokenLogprob:
    """What the model thought of a token, and of the `likeliest` ones at its place.

    Args:
        logits: [V].
        text: of an id, alone.
    """
    known = logits.float().log_softmax(dim=-1)
    values, ids = known.topk(min(likeliest, known.shape[0]))
    others = [(text(id), id, value) for id, value in zip(ids.tolist(), values.tolist(), strict=True)]
    return TokenLogprob(text(token), token, float(known[token]), tuple(others))
