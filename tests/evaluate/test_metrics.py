"""Right answers and the certainty of their mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from distilvlm.evaluate.metrics import (
    accurate,
    exact_match,
    interval,
    normalise,
    paired_difference,
    paired_ratios,
    ratio,
)


def test_exact_match_forgives_only_space_at_the_ends() -> None:
    assert exact_match(" blue\n", "blue")
    assert not exact_match("Blue", "blue")
    assert not exact_match("light  blue", "light blue")


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Yes.", "yes"),
        ("a Triangle", "triangle"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("light-blue!", "light blue"),
        ("it's", "its"),
        ("  The  (red)  car. ", "red car"),
        ("A", "a"),
    ],
)
def test_accuracy_forgives_what_vqa_forgives(prediction: str, answer: str) -> None:
    assert accurate(prediction, answer)
    assert not exact_match(prediction, answer)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [("red", "blue"), ("3.5", "35"), ("A", "the"), ("", "red"), ("red car", "redcar"), ("12", "1, 2"), ("A", "an")],
)
def test_accuracy_does_not_forgive_another_answer(prediction: str, answer: str) -> None:
    assert not accurate(prediction, answer)


def test_normalising_twice_changes_nothing() -> None:
    for text in ("The 1,000 Cars.", "A", "don't", "3.5 metres, the end", "(a) no"):
        assert normalise(normalise(text)) == normalise(text)


def test_the_interval_is_the_normal_one_for_many_values() -> None:
    values = np.zeros(4000)
    values[:1000] = 1
    found = interval(values)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 4000)
    assert found.mean == 0.25
    assert found.low == pytest.approx(0.25 - half, abs=1e-3)
    assert found.high == pytest.approx(0.25 + half, abs=1e-3)


def test_drawing_kinds_is_drawing_samples() -> None:
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=60)
    drawn = np.random.default_rng(1).choice(values, size=(20_000, 60)).mean(axis=1)
    found = interval(values, resamples=20_000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=6e-3)


def test_the_order_of_the_values_and_another_call_do_not_matter() -> None:
    values = np.arange(50) % 3 == 0
    assert interval(values, seed=3) == interval(values[::-1], seed=3) == interval(values, seed=3)


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()
    interval([0, 1, 1])
    assert (np.random.get_state()[1] == before).all()


def test_questions_of_one_picture_widen_the_interval() -> None:
    values = np.repeat([0.0, 1.0], 100)
    pictures = np.repeat(np.arange(20), 10).tolist()  # ten questions on each picture, all right or all wrong
    alone, together = interval(values), interval(values, pictures)
    assert together.mean == alone.mean == 0.5
    assert together.high - together.low > 2.5 * (alone.high - alone.low)  # sqrt(10) = 3.2 for endless pictures


def test_a_cluster_of_one_each_is_no_cluster() -> None:
    values = np.arange(30) % 4 == 0
    assert interval(values, list(range(30))) == interval(values)


def test_pairing_takes_out_what_both_find_hard() -> None:
    random = np.random.default_rng(0)
    hard = random.random(2000) < 0.5
    a = hard | (random.random(2000) < 0.1)
    difference = paired_difference(a, hard)
    assert difference.mean == pytest.approx(a.mean() - hard.mean())
    assert difference.low > 0
    unpaired = interval(a).high - interval(a).low
    assert difference.high - difference.low < 0.6 * unpaired


def test_equal_models_differ_by_nothing() -> None:
    found = paired_difference([0, 1, 1, 0], [0, 1, 1, 0])
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_what_cannot_be_paired_or_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match="same samples twice, not 2 and 3"):
        paired_difference([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="at least one value"):
        interval([])
    with pytest.raises(ValueError, match="2 cluster names for 3 values"):
        interval([0, 1, 1], ["a", "b"])


def bootstrapped(columns: np.ndarray, figure: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """The plain bootstrap: rows drawn one by one, 4,000 times."""
    draw = np.random.default_rng(1).integers(0, len(columns), (4000, len(columns)))
    low, high = np.nanquantile(figure(columns[draw].sum(axis=1)), [0.025, 0.975])
    return low, high


def test_a_ratio_draws_numerators_and_denominators_together() -> None:
    random = np.random.default_rng(0)
    mentions = random.integers(0, 9, 80)
    false = random.binomial(mentions, 0.3)
    found = ratio(false, mentions)
    assert found is not None and found.mean == false.sum() / mentions.sum()
    columns = np.stack([false, mentions], axis=1).astype(float)
    assert (found.low, found.high) == pytest.approx(bootstrapped(columns, lambda s: s[:, 0] / s[:, 1]), abs=0.01)


def test_a_ratio_of_clusters_is_the_ratio_of_their_sums() -> None:
    pictures = ["a", "b", "a", "c", "b"]
    alone = ratio([3, 1, 2], [4, 2, 3])
    assert ratio([1, 1, 2, 2, 0], [2, 1, 2, 3, 1], pictures) == alone


def test_a_ratio_without_a_denominator_is_undefined() -> None:
    assert ratio([0, 0], [0, 0]) is None
    assert paired_ratios(([1, 0], [1, 1]), ([0, 0], [0, 0])) is None


def test_resamples_that_leave_a_ratio_undefined_have_no_part_in_its_interval() -> None:
    found = ratio([1, 0, 0], [1, 0, 0])  # two thirds to the third of all resamples have no denominator
    assert found is not None and (found.mean, found.low, found.high) == (1, 1, 1)


def test_the_difference_of_ratios_is_paired() -> None:
    random = np.random.default_rng(0)
    mentions = random.integers(1, 9, 60)
    false = random.binomial(mentions, 0.4)
    other_mentions = mentions + random.integers(0, 2, 60)
    other_false = np.maximum(false - random.integers(0, 2, 60), 0)
    found = paired_ratios((false, mentions), (other_false, other_mentions))
    assert found is not None
    assert found.mean == pytest.approx(false.sum() / mentions.sum() - other_false.sum() / other_mentions.sum())
    columns = np.stack([false, mentions, other_false, other_mentions], axis=1).astype(float)
    expected = bootstrapped(columns, lambda s: s[:, 0] / s[:, 1] - s[:, 2] / s[:, 3])
    assert (found.low, found.high) == pytest.approx(expected, abs=0.01)


def test_a_ratio_minus_itself_is_nothing() -> None:
    assert paired_ratios(([1, 2], [3, 4]), ([1, 2], [3, 4])) == paired_ratios(([0, 0], [3, 4]), ([0, 0], [3, 4]))
    with pytest.raises(ValueError, match="as many denominators as numerators, not 1 and 2"):
        ratio([1, 2], [1])
