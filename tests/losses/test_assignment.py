"""EM-KD's assignment of visual rows: exact, and over logits."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from distilvlm.losses import Objective, Targets, assignment
from distilvlm.losses.assignment import assigned, cheapest


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 4), (3, 6), (5, 7)])
def test_the_sum_is_the_least_of_all_assignments(shape):
    draw = np.random.default_rng(0)
    for _ in range(30):
        cost = draw.integers(0, 6, shape).astype(float)  # ties are frequent
        chosen = cheapest(cost)
        assert len(set(chosen.tolist())) == shape[0]
        least = min(cost[range(shape[0]), list(columns)].sum() for columns in permutations(range(shape[1]), shape[0]))
        assert cost[range(shape[0]), chosen].sum() == least


def test_the_least_sum_is_not_the_greedy_one():
    assert cheapest(np.array([[1.0, 2.0], [1.0, 9.0]])).tolist() == [1, 0]


def test_more_rows_than_columns_are_refused():
    with pytest.raises(ValueError, match="3 rows can't each have one of 2 columns"):
        cheapest(np.zeros((3, 2)))


def test_cost_is_the_manhattan_distance_of_logits(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 3, generator=draw), torch.randn(6, 5, generator=draw)
    head, their_head = torch.randn(20, 3, generator=draw), torch.randn(23, 5, generator=draw)
    cost = ((student @ head.T)[:, None] - (teacher @ their_head.T)[None, :, :20]).abs().sum(-1)
    monkeypatch.setattr(assignment, "BLOCK", 7)
    assert assigned(student, head, teacher, their_head, 20).tolist() == cheapest(cost.double().numpy()).tolist()


def test_distances_are_those_of_cdist():
    draw = torch.Generator().manual_seed(2)
    first, second = torch.randn(5, 300, generator=draw).double(), torch.randn(9, 300, generator=draw).double()
    torch.testing.assert_close(assignment.distances(first, second), torch.cdist(first, second, p=1))
    assert assignment.distances(first[:0], second).shape == (0, 9)


def test_a_shuffled_picture_is_put_back_and_teaches_nothing():
    draw = torch.Generator().manual_seed(1)
    student, head = torch.randn(24, 5, generator=draw), torch.randn(30, 5, generator=draw)
    visual = torch.tensor([2, 3, 4, 5, 14, 15, 16, 17])
    order = torch.stack([torch.randperm(6, generator=draw) for _ in range(2)])
    others = torch.cat([student[visual].view(2, 4, 5), torch.randn(2, 2, 5, generator=draw)], dim=1)  # two more rows
    theirs = torch.stack([rows[places] for rows, places in zip(others, order, strict=True)])
    objective = Objective(text=0.0, visual=1.0, relation=1.0, assign=True)
    outcome = objective(
        *(student[visual], head, Targets(student[visual], head, visual=theirs), visual, visual // 12),
        *(visual[:0], visual[:0], visual, torch.ones(2), 2),
    )
    assert {name: round(float(value), 5) for name, value in outcome.terms.items()} == {"visual": 0.0, "relation": 0.0}
