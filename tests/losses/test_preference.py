"""Preference losses as functions of log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from distilvlm.losses import preference, rated
from distilvlm.losses.preference import PAIRED, moved


def pairs(seed: int = 0) -> list[Tensor]:
    """Four log-probabilities of five pairs, float64."""
    draw = torch.Generator().manual_seed(seed)
    return [-9 * torch.rand(5, generator=draw, dtype=torch.float64) for _ in range(4)]


def losses_of(four: Sequence[Tensor], kind: str = "kto", **more: Any) -> Tensor:
    chosen, rejected, ref_chosen, ref_rejected = four
    return preference(chosen, rejected, ref_chosen, ref_rejected, kind, **more)


def slopes(losses: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(losses.sum(), leaves)


@pytest.mark.parametrize(
    ("kind", "expected"), [("kto", [0.5, 0.5]), ("dpo", [math.log(2)]), ("hinge", [1.0]), ("ipo", [25.0])]
)
def test_a_policy_that_is_its_reference_has_the_loss_of_not_knowing(kind: str, expected: list[float]):
    chosen, rejected = torch.tensor([-3.0]), torch.tensor([-7.0])
    torch.testing.assert_close(preference(chosen, rejected, chosen, rejected, kind), torch.tensor(expected))


@pytest.mark.parametrize("kind", PAIRED)
def test_the_chosen_answer_is_raised_and_the_rejected_lowered(kind: str):
    chosen, rejected, *reference = (tensor.requires_grad_() for tensor in pairs())
    up, down = slopes(losses_of([chosen, rejected, *reference], kind), chosen, rejected)
    if kind == "ipo":  # towards its margin, from either side
        beyond = (chosen - rejected - reference[0] + reference[1]) > 5
        up, down = up * (1 - 2 * beyond.double()), down * (1 - 2 * beyond.double())
    assert (up <= 0).all() and (down >= 0).all() and (up != 0).any() and (down != 0).any()


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge"])
def test_what_the_policy_gains_on_both_answers_does_not_count(kind: str):
    chosen, rejected, *reference = pairs()
    shifted = losses_of([chosen + 2, rejected + 2, *reference], kind)
    torch.testing.assert_close(shifted, losses_of(pairs(), kind))


def test_kto_pulls_each_answer_alone():
    """Its loss of an answer does not depend on the one that it is paired with, but for z0."""
    chosen, rejected, *reference = pairs()
    still = (torch.tensor(0.7), torch.tensor(0.2))
    one = losses_of(pairs(), z0=still)
    other = preference(chosen, rejected.flip(0), reference[0], reference[1].flip(0), z0=still)
    torch.testing.assert_close(one[:5], other[:5])
    torch.testing.assert_close(one[5:], other[5:].flip(0))


def test_kto_s_z0_is_of_the_other_answers_and_never_negative():
    chosen, rejected = torch.tensor([3.0, -1.0]), torch.tensor([-2.0, -4.0])
    found = preference(chosen, rejected, chosen * 0, rejected * 0, beta=0.5)
    # The mean of the chosen is 1, which the rejected are compared with; that of the rejected is below 0.
    expected = [1 - 1 / (1 + math.exp(-0.5 * x)) for x in (3.0, -1.0, 1 + 2.0, 1 + 4.0)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_kto_s_z0_carries_no_gradient_unless_it_is_asked_to():
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in ([3.0, 4.0], [1.0, 2.0]))
    zeros = torch.zeros(2)
    constants = moved(chosen.detach()), moved(rejected.detach())
    expected = slopes(preference(chosen, rejected, zeros, zeros, z0=constants), chosen, rejected)
    for found, wanted in zip(
        slopes(preference(chosen, rejected, zeros, zeros), chosen, rejected), expected, strict=True
    ):
        assert torch.equal(found, wanted)
    undetached = slopes(preference(chosen, rejected, zeros, zeros, detach=False), chosen, rejected)
    assert all(not torch.allclose(found, wanted) for found, wanted in zip(undetached, expected, strict=True))
    lower = torch.tensor([-3.0, -1.0], requires_grad=True)  # below its reference: z0 is held at 0
    (found,) = slopes(preference(lower, zeros, zeros, zeros, detach=False)[2:], lower)
    assert not found.any()


def test_weights_of_desirable_and_undesirable_answers_scale_their_halves():
    plain = losses_of(pairs())
    weighted = losses_of(pairs(), desirable=2.0, undesirable=0.25)
    torch.testing.assert_close(weighted, torch.cat([2 * plain[:5], 0.25 * plain[5:]]))


def test_label_smoothing_is_the_loss_of_some_pairs_the_wrong_way_round():
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    right = preference(chosen, rejected, ref_chosen, ref_rejected, "dpo")
    wrong = preference(rejected, chosen, ref_rejected, ref_chosen, "dpo")
    smoothed = losses_of(pairs(), "dpo", label_smoothing=0.2)
    torch.testing.assert_close(smoothed, 0.8 * right + 0.2 * wrong)


def test_rated_answers_are_the_halves_of_pairs():
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    z0, good = torch.tensor(0.4, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    weights: dict[str, Any] = {"desirable": 1.5, "undesirable": 0.5}
    both = losses_of(pairs(), z0=(z0, z0), **weights)
    torch.testing.assert_close(rated(chosen, ref_chosen, good, z0, **weights), both[:5])
    torch.testing.assert_close(rated(rejected, ref_rejected, ~good, z0, **weights), both[5:])


def test_rated_answers_leave_z0_as_it_is():
    policy, z0 = pairs()[0].requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    good = torch.tensor([True, False, True, False, True])
    losses = rated(policy, pairs()[1], good, z0).sum()
    (slope,) = torch.autograd.grad(losses, policy)
    assert z0.grad is None and ((slope < 0) == good).all()


def test_extreme_log_probabilities_stay_finite():
    far = torch.tensor([-2000.0, 2000.0], requires_grad=True)
    zeros = torch.zeros(2)
    for kind in PAIRED:
        losses = preference(far, -far, zeros, zeros, kind)
        assert losses.isfinite().all() and slopes(losses, far)[0].isfinite().all()


def test_an_unknown_kind_names_the_known_and_numbers_that_differ_are_refused():
    with pytest.raises(ValueError, match="'kto_pair'; known are kto, dpo, ipo, hinge, and `rated`"):
        losses_of(pairs(), "kto_pair")
    chosen, rejected, *reference = pairs()
    with pytest.raises(ValueError, match="a pair needs four log-probabilities"):
        losses_of([chosen[:4], rejected, *reference])
