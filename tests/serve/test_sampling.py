"""Draws follow the distribution they are said to follow, and depend on nothing but their own numbers."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from distilvlm.serve import sampling
from distilvlm.serve.sampling import Draw, choose, logprob

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf, 1.5])


def shares(temperature: float, top_p: float, draws: int = 4000) -> list[float]:
    draw = Draw(temperature, top_p, random.Random(0))
    counts = Counter(token for _ in range(draws // 100) for token in choose(LOGITS.repeat(100, 1), [draw] * 100))
    return [counts[id] / draws for id in range(6)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_are_the_softmax_at_the_temperature(temperature: float) -> None:
    assert shares(temperature, 1.0) == pytest.approx((LOGITS / temperature).softmax(0).tolist(), abs=0.03)


def test_a_nucleus_is_the_smallest_set_that_has_its_share() -> None:
    full = LOGITS.softmax(0)  # 0.47, 0.28 (id 5), 0.17 (id 1), ...
    found = shares(1.0, 0.8)
    assert found[2] == found[3] == found[4] == 0
    kept = full[[0, 1, 5]] / full[[0, 1, 5]].sum()
    assert [found[0], found[1], found[5]] == pytest.approx(kept.tolist(), abs=0.03)


@pytest.mark.parametrize("share", [1e-6, 0.3, 0.9, 0.999999])
def test_a_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(share: float) -> None:
    probabilities = (3 * torch.randn(5000, generator=torch.Generator().manual_seed(1))).softmax(0)
    values, ids = probabilities.sort(descending=True)
    wanted = ids[: int((values.cumsum(0) - values < share).sum())]
    assert sampling._nucleus(probabilities, share).nonzero().flatten().tolist() == sorted(wanted.tolist())


def test_no_temperature_overflows_and_the_lowest_is_greedy() -> None:
    logits = torch.tensor([[3e4, 2.9e4, -3e4]])
    assert choose(logits, [Draw(1e-9, 1.0, random.Random(0))]) == [0]
    assert choose(logits, [Draw(0.0, 1.0, random.Random(0))]) == [0]


def test_rows_do_not_share_their_numbers() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    settings = [(0.7, 1.0), (0.0, 1.0), (1.3, 0.5), (1.0, 0.9)]
    together = choose(logits, [Draw(*setting, random.Random(row)) for row, setting in enumerate(settings)])
    alone = [choose(logits[row : row + 1], [Draw(*s, random.Random(row))])[0] for row, s in enumerate(settings)]
    assert together == alone


def test_log_probabilities_are_before_temperature_and_nucleus() -> None:
    known = logprob(LOGITS, 2, 3, str)
    assert known.logprob == pytest.approx(float(LOGITS.log_softmax(0)[2]))
    assert [(text, id) for text, id, _ in known.likeliest] == [("0", 0), ("5", 5), ("1", 1)]
