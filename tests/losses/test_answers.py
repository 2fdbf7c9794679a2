"""A stage's preference term: the gradient of whole answers, through the chunked head, is that of the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distilvlm.losses import Answers, Objective, Outcome, Preferences
from distilvlm.losses.answers import moves

LENGTH, WIDTH, VOCABULARY = 9, 5, 17
PAIRS, RATED = torch.tensor([1, -1] * 4), torch.tensor([1, 0, -1, 0, -1, 0, 1, 0])
Agree = Callable[[Tensor], Tensor] | None
KINDS = ["kto", "dpo", "ipo", "hinge", "kto_unpaired"]


@dataclass(frozen=True)
class World:
    """Four records of two sequences. Answers have 1 to 6 tokens; `predicted` is the id after each position or -100."""

    hidden: Tensor  # [8, LENGTH, WIDTH]
    head: Tensor  # [VOCABULARY, WIDTH]
    predicted: Tensor  # [8, LENGTH]
    reference: Tensor  # [8]
    weights: Tensor  # [8]

    def roles(self, kind: str) -> Tensor:
        return (RATED if kind == "kto_unpaired" else PAIRS)[: len(self.hidden)]

    def of(self, records: list[int]) -> World:
        at = torch.tensor([2 * record + side for record in records for side in (0, 1)])
        return World(self.hidden[at], self.head, self.predicted[at], self.reference[at], self.weights[at])

    def run(
        self, kind: str, in_update: int | None = None, agree: Agree = None, roles: Tensor | None = None, **more: Any
    ) -> Outcome:
        objective = Objective(text=0, preference=0.7, preference_kind=kind, **more)
        response = torch.nonzero(self.predicted.flatten() != -100).squeeze(1)
        rows = objective.rows(response, response[:0])
        given = Preferences(self.roles(kind) if roles is None else roles, self.reference)
        return objective(
            self.hidden.flatten(0, 1)[rows],
            self.head,
            None,
            rows=rows,
            owners=rows // LENGTH,
            response_rows=response,
            response_targets=self.predicted.flatten()[response],
            visual_rows=response[:0],
            sample_weights=self.weights,
            samples_in_update=in_update or len(self.hidden) // 2,
            preferences=given if agree is None else replace(given, agree=agree),
        )

    def logps(self) -> Tensor:
        """[8] of materialised logits."""
        each = (self.hidden @ self.head.T).log_softmax(-1)
        picked = each.gather(2, self.predicted.clamp_min(0).unsqueeze(2)).squeeze(2)
        return (picked * (self.predicted != -100)).sum(1)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(loss, (self.hidden, self.head), retain_graph=True)  # type: ignore[return-value]


@pytest.fixture
def world() -> World:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(8, LENGTH, WIDTH, generator=draw, dtype=torch.float64)
    head = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64)
    predicted = torch.randint(0, VOCABULARY, (8, LENGTH), generator=draw)
    for number, tokens in enumerate([1, 6, 3, 2, 5, 4, 2, 6]):
        predicted[number, : LENGTH - 1 - tokens] = predicted[number, -1] = -100
    world = World(hidden, head, predicted, torch.zeros(8), torch.ones(8))
    # The reference is near enough that no loss is saturated, and z0 of both sides is more than 0.
    reference = world.logps() - torch.tensor([3.0, 1, -2, 2, 4, -3, -1, 5])
    return replace(world, hidden=hidden.requires_grad_(), head=head.requires_grad_(), reference=reference)


def formula(world: World, kind: str, beta: float, detach: bool = True) -> Tensor:
    """The loss of records that are an update, with autograd through everything."""
    ratio, weight = world.logps() - world.reference, world.weights[::2].double()
    first, second = ratio[::2], ratio[1::2]
    z = [((x * weight).sum() / weight.sum()).clamp_min(0) for x in (first, second)]
    z = [x.detach() if detach else x for x in z]
    if kind == "kto":
        losses = (2 - torch.sigmoid(beta * (first - z[1])) - torch.sigmoid(beta * (z[0] - second))) / 2
    elif kind == "kto_unpaired":
        sign = world.roles(kind)[::2].double()
        losses = 1 - torch.sigmoid(beta * sign * (first - z[1]))
    elif kind == "dpo":
        losses = torch.log1p(torch.exp(-beta * (first - second)))
    elif kind == "ipo":
        losses = (first - second - 1 / (2 * beta)) ** 2
    else:
        losses = (1 - beta * (first - second)).clamp_min(0)
    return 0.7 * (losses * weight).sum() / len(weight)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_materialised_logits(world: World, kind: str):
    out, expected = world.run(kind, beta=0.3), formula(world, kind, 0.3)
    close(out.loss, expected)
    close(out.terms["preference"], expected.detach() / 0.7)
    for found, wanted in zip(world.gradients(out.loss), world.gradients(expected), strict=True):
        assert wanted.any()
        close(found, wanted)


def test_the_reference_s_z0_carries_a_gradient(world: World):
    out = world.run("kto", reference=frozenset({"undetached_z0"}))
    expected, detached = formula(world, "kto", 0.1, detach=False), formula(world, "kto", 0.1)
    close(out.loss, expected)
    for found, wanted, other in zip(
        world.gradients(out.loss), world.gradients(expected), world.gradients(detached), strict=True
    ):
        close(found, wanted)
        assert not torch.allclose(found, other, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arrangement", [[[0, 1], [2, 3]], [[3], [1], [0], [2]], [[2, 0, 3], [1]]])
def test_micro_batches_and_their_order_do_not_change_the_objective(
    world: World, kind: str, arrangement: list[list[int]]
):
    whole = world.run(kind)
    given = Preferences(world.roles(kind), world.reference)
    sums = moves(world.logps().detach(), given, world.weights)
    parts = [
        world.of(records).run(
            kind,
            in_update=4,
            agree=lambda _: sums,
            roles=world.roles(kind)[[2 * record + side for record in records for side in (0, 1)]],
        )
        for records in arrangement
    ]
    close(sum(part.loss for part in parts), whole.loss)
    for name, value in whole.terms.items():
        close(sum(part.terms[name] for part in parts), value)
    found = world.gradients(sum((part.loss for part in parts), torch.zeros(())))
    for one, wanted in zip(found, world.gradients(whole.loss), strict=True):
        close(one, wanted)


def test_what_z0_is_made_of_adds_up(world: World):
    given = Preferences(world.roles("kto"), world.reference)
    whole = moves(world.logps().detach(), given, world.weights)
    parts = [
        moves(part.logps().detach(), Preferences(part.roles("kto"), part.reference), part.weights)
        for part in (world.of([0, 3]), world.of([2, 1]))
    ]
    close(parts[0] + parts[1], whole)
    ratios = (world.logps() - world.reference).detach()
    close(whole, torch.stack([ratios[::2].sum(), ratios[1::2].sum(), torch.tensor(4.0, dtype=torch.float64)]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stand_in_counts_only_in_the_denominator(world: World, kind: str):
    """Neither the loss nor z0 knows of it, and it gets no gradient, whatever it holds."""
    weights = torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 1])
    without = replace(world, weights=weights)
    out, expected = without.run(kind), formula(without, kind, 0.1)
    close(out.loss, expected)
    hidden, head = without.gradients(out.loss)
    close(head, without.gradients(expected)[1])
    assert not hidden[4:6].any()
    assert not math.isclose(out.loss.item(), world.run(kind).loss.item(), rel_tol=1e-3)


def test_all_stand_ins_are_zero_not_nan(world: World):
    nothing = replace(world, weights=torch.zeros(8))
    for kind in KINDS:
        for reference in (frozenset[str](), frozenset({"undetached_z0"})):
            out = nothing.run(kind, reference=reference)
            assert out.loss == 0 and all(value == 0 for value in out.terms.values())
            assert not any(gradient.any() for gradient in nothing.gradients(out.loss))


def test_mismatched_sequences_move_z0_and_get_no_gradient(world: World):
    out = world.run("kto_unpaired")
    hidden, _ = world.gradients(out.loss)
    assert hidden[::2].any() and not hidden[1::2].any()
    close(out.terms["z0"], (world.logps() - world.reference)[1::2].mean().detach())
    further = replace(world, reference=world.reference - torch.tensor([0.0, 2] * 4))
    close(further.run("kto_unpaired").terms["z0"], out.terms["z0"] + 2)
    assert not math.isclose(further.run("kto_unpaired").loss.item(), out.loss.item(), rel_tol=1e-4)


def test_an_answer_of_no_more_use_costs_nothing(world: World):
    """All margins are met: there is no slope, so no row goes through the head again."""
    far = torch.tensor([-90.0, 90] * 4)
    met = replace(world, reference=(world.logps() + far).detach())
    out = met.run("hinge")
    assert out.loss == 0 and out.terms["preference_accuracy"] == 1
    assert not any(gradient.any() for gradient in met.gradients(out.loss))


def test_what_is_told_beside_the_loss(world: World):
    terms = world.run("dpo", beta=0.2).terms
    ratios = (world.logps() - world.reference).detach()
    close(terms["chosen_reward"], 0.2 * ratios[::2].mean())
    close(terms["rejected_reward"], 0.2 * ratios[1::2].mean())
    close(terms["preference_accuracy"], (ratios[::2] > ratios[1::2]).double().mean())
    assert not any(value.requires_grad for value in terms.values())


def test_log_probabilities_of_answers_are_exact_sums_without_gradient(world: World):
    response = torch.nonzero(world.predicted.flatten() != -100).squeeze(1)
    targets = world.predicted.flatten()[response]
    answers = Answers.of(
        world.hidden.flatten(0, 1)[response], world.head, response, response // LENGTH, response, targets
    )
    found = answers.log_probabilities(8)
    close(found, world.logps().detach())
    assert not found.requires_grad and found.dtype == torch.float64


def test_autocast_and_fp32_stay_close(world: World):
    single = replace(
        world,
        hidden=world.hidden.detach().float().requires_grad_(),
        head=world.head.detach().float().requires_grad_(),
    )
    expected = world.gradients(world.run("kto").loss)
    for found, wanted in zip(single.gradients(single.run("kto").loss), expected, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    with torch.autocast("cpu", torch.bfloat16):
        loss = single.run("kto").loss
    for found, wanted in zip(single.gradients(loss), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() <= 3e-2 * wanted.norm()


def test_a_preference_stage_says_what_it_needs_and_refuses_to_go_without(world: World):
    objective = Objective(text=0, preference=1, balance=0.01)
    assert objective.needs == {"student.hidden", "reference.logps", "router.probabilities"}
    assert objective.agrees and not replace(objective, preference_kind="dpo").agrees
    assert not replace(objective, reference=frozenset({"undetached_z0"})).agrees
    rows = torch.tensor([2, 3])
    with pytest.raises(ValueError, match="needs roles and reference log-probabilities"):
        objective(
            world.hidden.flatten(0, 1)[rows], world.head, None, rows, rows // LENGTH, rows, rows, rows[:0],
            torch.ones(2), 1,
        )  # fmt: skip
