"""Which token comes next: every row by its own temperature, nucleus and random numbers, whatever shares its batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import TokenLogprob


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
    for row, draw in enumerate(draws):
        if draw.top_p < 1:
            probabilities[row] = _nucleus(probabilities[row], draw.top_p)
    reach = probabilities.cumsum(dim=-1, dtype=torch.float64)
    numbers = torch.tensor([draw.numbers.random() for draw in draws], dtype=torch.float64, device=logits.device)
    return torch.searchsorted(reach, numbers[:, None] * reach[:, -1:], right=True)[:, 0]


def _nucleus(probabilities: Tensor, share: float) -> Tensor:
    """[V]: zero outside of the smallest set of likeliest tokens that have the share together. Tokens that are as likely
    as its last are in it, too: which of them come first, nothing says."""
    # All that are less likely than this have less than 1 - share together: they need not be sorted.
    candidates = probabilities[probabilities > (1 - share) / len(probabilities)]
    values = candidates.sort(descending=True).values
    likelier = values.cumsum(dim=0) - values
    return probabilities.where(probabilities >= values[likelier < share][-1], 0.0)


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
