"""An update's samples are a function of its number; every epoch holds every sample once."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from distilvlm.data import Order, shares, showings


def make_order(
    samples: int, batch: int, order: str = "random", seed: int = 3, stage: str = "dpt", mixture=None
) -> Order:
    rng = np.random.default_rng(0)
    pictures = (rng.random(samples) < 0.6).astype(np.int64)
    lengths = rng.integers(1, 99, samples)
    return Order(samples, batch, seed, stage, order, lengths=lengths, pictures=pictures, mixture=mixture)  # type: ignore[arg-type]


SIZES = [(7, 2), (8, 4), (3, 8), (101, 8), (1, 1), (64, 16)]


@pytest.mark.parametrize(("samples", "batch"), SIZES)
@pytest.mark.parametrize("order", ["random", "grouped"])
def test_every_epoch_holds_every_sample_once_and_only_its_last_update_is_smaller(samples, batch, order):
    made = make_order(samples, batch, order)
    for epoch in (0, 1, 5):
        first = epoch * made.updates_per_epoch
        updates = [made.update(first + place) for place in range(made.updates_per_epoch)]
        assert sorted(itertools.chain(*updates)) == [(epoch, index) for index in range(samples)]
        assert [len(update) for update in updates[:-1]] == [batch] * (len(updates) - 1)
        assert 0 < len(updates[-1]) <= batch


@pytest.mark.parametrize("order", ["random", "grouped"])
def test_an_update_does_not_depend_on_what_was_asked_before(order):
    walked, jumped = make_order(50, 8, order), make_order(50, 8, order)
    by_walking = [walked.update(number) for number in range(40)]
    assert [jumped.update(number) for number in reversed(range(40))] == by_walking[::-1]
    assert make_order(50, 8, order).update(1_000_003) == walked.update(1_000_003)


def test_epochs_seeds_and_stages_have_different_orders():
    made = make_order(50, 50)
    first = [index for _, index in made.update(0)]
    for other in (made.update(1), make_order(50, 50, seed=4).update(0), make_order(50, 50, stage="dft").update(0)):
        assert [index for _, index in other] != first


def test_grouped_updates_hold_one_modality_longest_first():
    made = make_order(200, 10, "grouped")
    pictures, lengths = made._pictures, made._lengths
    mixed = 0
    for number in range(made.updates_per_epoch):
        members = [index for _, index in made.update(number)]
        mixed += len({bool(pictures[index]) for index in members}) > 1
        assert [lengths[index] for index in members] == sorted((lengths[index] for index in members), reverse=True)
        if mixed:
            assert number >= made.updates_per_epoch - 2  # what is left of both modalities comes last
    assert mixed <= 2


@pytest.mark.parametrize(("epochs", "expected"), [(1, 30), (0.1, 3), (0.11, 4), (2.5, 75), (0.001, 1)])
def test_updates_of_fractional_epochs(epochs, expected):
    assert make_order(299, 10).total_updates(epochs=epochs) == expected
    assert make_order(299, 10).total_updates(updates=7) == 7


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_all_samples_exactly_once(world):
    indices = list(range(7))
    ranks = shares(indices, world)
    assert len(ranks) == world
    assert sorted(itertools.chain(*ranks)) == indices
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def test_a_rank_without_samples_has_no_share():
    assert shares([4, 2], 3) == [[4], [2], []]


def test_grouped_needs_lengths():
    with pytest.raises(ValueError, match="needs the length"):
        Order(5, 2, 0, "dpt", "grouped")


def digest(order: Order, updates: int = 40) -> str:
    return hashlib.sha256(str([order.update(number) for number in range(updates)]).encode()).hexdigest()[:16]


@pytest.mark.parametrize("mixture", [None, [(101, 1.0)], [(40, 1.0), (0, 3.0), (61, 1.0)]])
def test_weights_of_one_leave_the_order_of_published_runs_as_it_was(mixture):
    assert digest(make_order(101, 8, mixture=mixture)) == "63bb1b1b2041360f"
    assert digest(make_order(101, 8, "grouped", mixture=mixture)) == "6d5a463d5bdae7bb"


def epochs_of(order: Order, count: int) -> list[list[tuple[int, int]]]:
    n = order.updates_per_epoch
    return [list(itertools.chain(*(order.update(e * n + place) for place in range(n)))) for e in range(count)]


@pytest.mark.parametrize("order", ["random", "grouped"])
def test_weights_say_how_often_an_epoch_shows_a_row(order):
    mixture = [(20, 1.0), (7, 2.0), (15, 0.5)]
    first, second = epochs_of(make_order(42, 8, order, mixture=mixture), 2)
    for epoch, members in enumerate((first, second)):
        assert sorted(m for m in members if m[1] < 20) == [(epoch, index) for index in range(20)]
        twice = [m for m in members if 20 <= m[1] < 27]
        assert sorted(twice) == [(showing, index) for showing in (2 * epoch, 2 * epoch + 1) for index in range(20, 27)]
    halves = [[m for m in members if m[1] >= 27] for members in (first, second)]
    assert [len(half) for half in halves] == [8, 8]
    assert sorted(m for m in halves[0] + halves[1] if m[0] == 0) == [(0, index) for index in range(27, 42)]
    assert [showing for showing, _ in sorted(halves[1])] == [0] * 7 + [1]  # 16 showings of 15 rows


@pytest.mark.parametrize("weight", [0.3, 0.5, 1.5, 2.7, 3])
def test_no_showing_of_a_sample_is_like_another_and_all_are_seen_alike(weight):
    """Augmentation is drawn by (pass, index): a row that comes twice in an epoch must not look the same twice."""
    made = make_order(23, 4, mixture=[(13, 1.0), (10, weight)])
    seen = list(itertools.chain(*epochs_of(made, 10)))
    assert len(set(seen)) == len(seen)
    counts = np.bincount([index for _, index in seen], minlength=23)
    assert set(counts[:13]) == {10}
    assert counts[13:].max() - counts[13:].min() <= 1
    assert counts[13:].sum() == 10 * showings(10, weight)


def test_a_weighted_update_does_not_depend_on_what_was_asked_before():
    mixture = [(30, 0.4), (20, 2.5)]
    walked, jumped = (make_order(50, 8, mixture=mixture) for _ in range(2))
    by_walking = [walked.update(number) for number in range(60)]
    assert [jumped.update(number) for number in reversed(range(60))] == by_walking[::-1]


def test_a_mixture_counts_what_an_epoch_shows():
    assert [showings(10, weight) for weight in (0.5, 1, 1.1, 0.01)] == [5, 10, 11, 1]
    made = make_order(30, 10, mixture=[(10, 0.5), (20, 2.0)])
    assert (made.per_epoch, made.updates_per_epoch, made.total_updates(epochs=2)) == (45, 5, 10)
    with pytest.raises(ValueError, match="do not have 30 samples"):
        make_order(30, 10, mixture=[(10, 1.0)])
