"""Micro-batches of so many positions: never more, every sample once, the same each time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from distilvlm.data import Grouping
from distilvlm.data.collate import padded
from distilvlm.recipe.schema import MachineSpec, StageSpec

LENGTHS = np.random.default_rng(0).integers(1, 200, 300).tolist()


def lengths(index: int) -> tuple[int, ...]:
    return (LENGTHS[index],)


def both(index: int) -> tuple[int, ...]:
    return LENGTHS[index], LENGTHS[-1 - index]


@pytest.mark.parametrize("of", [lengths, both])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [416, 500, 4096])
def test_the_budget_is_never_exceeded_and_every_sample_comes_once(tokens, packed, of):
    samples = [(number % 3, index) for number, index in enumerate(np.random.default_rng(1).permutation(300)[:120])]
    grouping = Grouping(tokens=tokens, packed=packed)
    groups = grouping.split(samples, of)
    assert sorted(itertools.chain(*groups)) == sorted(samples)
    for group in groups:
        own = [length for _, index in group for length in of(index)]
        assert grouping.positions(own) <= tokens
        assert grouping.positions(own) == (padded(sum(own)) if packed else len(own) * padded(max(own)))
    assert groups == grouping.split(samples, of)


def test_padded_samples_stand_beside_those_of_similar_length():
    groups = Grouping(tokens=1024).split([(0, index) for index in range(300)], lengths)
    longest = [max(LENGTHS[index] for _, index in group) for group in groups]
    shortest = [min(LENGTHS[index] for _, index in group) for group in groups]
    assert all(one >= other for one, other in zip(shortest, longest[1:], strict=False))
    held = sum(LENGTHS) / sum(len(group) * padded(most) for group, most in zip(groups, longest, strict=True))
    mixed = Grouping(6).split([(0, index) for index in range(300)], lengths)
    in_order = sum(len(group) * padded(max(LENGTHS[index] for _, index in group)) for group in mixed)
    assert held > 0.9 > 0.7 > sum(LENGTHS) / in_order


def test_lines_are_full():
    """First-fit decreasing needs at most 11/9 of the fewest lines; here hardly one more."""
    groups = Grouping(tokens=1024, packed=True).split([(0, index) for index in range(300)], lengths)
    assert len(groups) <= sum(LENGTHS) / 1024 + 2
    assert LENGTHS[groups[0][0][1]] == max(LENGTHS)


def test_samples_are_counted_in_their_order_without_a_budget():
    samples = [(0, index) for index in (4, 2, 9, 1, 7)]
    for packed in (False, True):
        assert Grouping(2, packed=packed).split(samples, lengths) == [samples[:2], samples[2:4], samples[4:]]
    assert Grouping(2, tokens=4096).split([], lengths) == []


def test_a_sample_without_room_is_refused_by_what_it_takes():
    with pytest.raises(ValueError, match=r"sample 3 takes 112 positions, .* has 100: set machine.tokens to 112"):
        Grouping(tokens=100).split([(0, 3)], lambda index: (101,))


def test_a_stage_of_pictures_alone_counts_samples():
    machine = MachineSpec(micro_batch=8, tokens=2048, packing=True)
    optim = {"lr": 1e-3, "batch": 2, "updates": 1}

    def stage(loss: dict[str, float]) -> StageSpec:
        content = {"name": "one", "train": ["vision"], "data": ["some"], "loss": loss, "optim": optim}
        return StageSpec.model_validate(content)

    assert Grouping.of(machine, stage({"text": 1.0})) == Grouping(8, 2048, packed=True)
    assert Grouping.of(machine, stage({"text": 0.0, "encoder": 1.0})) == Grouping(8)
