"""Balance of experts: what it is at its ends, what counts in it, and that micro-batches do not change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distilvlm.losses import Objective, Preferences, balance

EXPERTS, LENGTH = 4, 6


def logits(samples: int, seed: int = 0) -> Tensor:
    """[samples, LENGTH, EXPERTS] float64"""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(samples, LENGTH, EXPERTS, generator=draw, dtype=torch.float64)


def everything(tokens: int) -> Tensor:
    return torch.ones(tokens, dtype=torch.bool)


def test_uniform_routing_is_one():
    assert balance(torch.full((12, EXPERTS), 1 / EXPERTS), everything(12)) == 1
    # Each token is sure of its expert, and each expert has as many tokens.
    sure = torch.eye(EXPERTS).repeat(3, 1)
    assert balance(sure, everything(12)) == 1


def test_everybody_s_only_choice_costs_the_number_of_experts():
    one = torch.zeros(12, EXPERTS)
    one[:, 2] = 1
    assert balance(one, everything(12)) == EXPERTS


def test_padding_does_not_count():
    probabilities = logits(1)[0].softmax(-1)
    mask = torch.tensor([True, True, False, True, False, False])
    expected = balance(probabilities[mask], everything(3))
    assert torch.equal(balance(probabilities, mask), expected)
    probabilities[~mask] = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    assert torch.equal(balance(probabilities, mask), expected)


def test_only_the_first_choice_counts():
    """Second choices that are all one expert's change it by their probability alone, as any other would."""
    first = [0, 1, 2, 0, 1, 2]

    def of(second: list[int]) -> Tensor:
        probabilities = torch.full((6, EXPERTS), 0.05, dtype=torch.float64)
        for token, (one, other) in enumerate(zip(first, second, strict=True)):
            probabilities[token, one], probabilities[token, other] = 0.6, 0.3
        return balance(probabilities, everything(6))

    # Experts 0, 1 and 2 are two tokens' first choice each, so a second choice among them weighs the same.
    torch.testing.assert_close(of([1, 2, 0, 1, 2, 0]), of([1, 0, 0, 2, 0, 1]))
    assert of([3] * 6) < of([1, 2, 0, 1, 2, 0])


def test_gradient_is_that_of_the_formula():
    z, mask = logits(1)[0].requires_grad_(), torch.tensor([True] * 5 + [False])
    (found,) = torch.autograd.grad(balance(z.softmax(-1), mask), z)
    p = z.softmax(-1)[:5]
    shares = torch.stack([(p.argmax(-1) == e).double().mean() for e in range(EXPERTS)])
    (expected,) = torch.autograd.grad(EXPERTS * (p.mean(0) * shares).sum(), z)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)
    assert not found[5].any()


def test_probabilities_without_a_mask_of_their_length_are_refused():
    with pytest.raises(ValueError, match="6 tokens have probabilities, but the mask has 5"):
        balance(logits(1)[0].softmax(-1), everything(5))
    with pytest.raises(ValueError, match="the mask is empty"):
        balance(logits(1)[0].softmax(-1), ~everything(6))


# As a term of a stage

MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4, [0] * 6])


def term(
    layers: list[Tensor],
    mask: Tensor,
    samples_in_update: int,
    weights: Tensor | None = None,
    roles: Tensor | None = None,
    **objective: Any,
) -> Tensor:
    """The balance of layers [samples, LENGTH, EXPERTS] of logits, as what it adds to a loss of one answered token."""
    samples = len(mask)
    rows = torch.arange(samples) * LENGTH
    kind = {"text": 0, "preference": 1} if roles is not None else {"text": 1}
    if weights is None:
        weights = torch.ones(samples)

    def run(coefficient: float) -> Tensor:
        return Objective(**kind, balance=coefficient, **objective)(
            torch.zeros(samples, 3, dtype=torch.float64),
            torch.zeros(5, 3, dtype=torch.float64),
            None,
            rows=rows,
            owners=rows // LENGTH,
            response_rows=rows,
            response_targets=rows * 0,
            visual_rows=rows[:0],
            sample_weights=weights,
            samples_in_update=samples_in_update,
            router_probabilities=[z.softmax(-1).flatten(0, 1) for z in layers],
            position_owners=torch.where(mask.bool(), torch.arange(samples).unsqueeze(1), -1).flatten(),
            preferences=None if roles is None else Preferences(roles, torch.zeros(samples, dtype=torch.float64)),
        ).loss

    return run(1.0) - run(0.0)


def of_samples(layers: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Σ over layers of each sample's balance; 0 for one that has no token."""
    return [
        sum((balance(z[i].softmax(-1), mask[i].bool()) for z in layers), torch.zeros(())) if mask[i].any() else
        torch.zeros((), dtype=torch.float64)
        for i in range(len(mask))
    ]  # fmt: skip


def test_a_stage_s_term_is_per_sample_and_summed_over_layers():
    layers = [logits(4, seed) for seed in (1, 2)]
    expected = sum(of_samples(layers, MASK), torch.zeros(())) / 4
    torch.testing.assert_close(term(layers, MASK, 4), expected)


def test_micro_batches_do_not_change_it():
    layers = [logits(4, seed).requires_grad_() for seed in (1, 2)]
    whole = term(layers, MASK, 4)
    parts = [term([z[at] for z in layers], MASK[at], 4) for at in ([2, 0], [3], [1])]
    torch.testing.assert_close(sum(parts), whole)
    for found, expected in zip(
        torch.autograd.grad(sum(parts, torch.zeros(())), layers), torch.autograd.grad(whole, layers), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_stand_in_counts_only_in_the_denominator():
    layers = [logits(4)]
    alone = term(layers, MASK, 4, weights=torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(alone, of_samples(layers, MASK)[0] / 4)


def test_both_answers_of_a_pair_balance_experts_and_a_mismatched_one_does_not():
    layers, each = [logits(4)], of_samples([logits(4)], MASK)
    pairs = term(layers, MASK, 2, roles=torch.tensor([1, -1, 1, -1]))
    torch.testing.assert_close(pairs, sum(each, torch.zeros(())) / 2)
    rated = term(layers, MASK, 2, roles=torch.tensor([1, 0, -1, 0]), preference_kind="kto_unpaired")
    torch.testing.assert_close(rated, (each[0] + each[2]) / 2)


def test_the_reference_s_balance_is_of_all_positions_together_and_twice_beside_text():
    layers, two = [logits(2)], MASK[:2]
    together = balance(logits(2).flatten(0, 1).softmax(-1), everything(2 * LENGTH))
    torch.testing.assert_close(term(layers, two, 2, reference=frozenset({"padding"})), together)
    torch.testing.assert_close(term(layers, two, 2, reference=frozenset({"padding", "doubled_balance"})), 2 * together)
    once = term(layers, two, 2, roles=torch.tensor([1, -1]), reference=frozenset({"doubled_balance"}))
    torch.testing.assert_close(once, term(layers, two, 2, roles=torch.tensor([1, -1])))  # no text loss


def test_the_reference_s_balance_of_a_pair_is_that_of_two_forward_passes():
    z = logits(4)
    apart = sum(balance(z[at].flatten(0, 1).softmax(-1), everything(2 * LENGTH)) for at in ([0, 2], [1, 3]))
    found = term([z], MASK, 2, roles=torch.tensor([1, -1, 1, -1]), reference=frozenset({"padding"}))
    torch.testing.assert_close(found, apart)


def test_a_dense_student_has_no_balance():
    with pytest.raises(ValueError, match="only a sparse student"):
        term([], MASK, 4)
