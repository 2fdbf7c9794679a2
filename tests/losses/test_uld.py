"""Universal logit distillation and what is compared with it: vocabularies of which no id means the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distilvlm.losses import Objective, Targets, gram, linear_distillation, relation
from distilvlm.losses.divergences import compared_ids, uld

DRAW = torch.Generator().manual_seed(3)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def test_distance_is_of_sorted_probabilities_with_the_shorter_filled_up():
    student = torch.tensor([[0.1, 0.6, 0.3]]).log()
    teacher = torch.tensor([[0.2, 0.05, 0.5, 0.25]]).log()
    # 0.6 0.3 0.1 0 against 0.5 0.25 0.2 0.05
    value, _ = uld(student, teacher)
    assert value.item() == pytest.approx(0.1 + 0.05 + 0.1 + 0.05)


def test_order_of_ids_does_not_matter_and_equal_shapes_are_zero():
    student = normal(4, 9).log_softmax(-1)
    shuffled = student[:, torch.randperm(9, generator=DRAW)]
    value, gradient = uld(student.clone(), shuffled.clone())
    assert value.tolist() == [0.0] * 4
    assert not gradient.any()


def test_farthest_apart_are_two():
    certain = torch.full((1, 5000), -1e4)
    certain[0, 7] = 0.0
    value, _ = uld(certain, torch.full((1, 5000), -math.log(5000)))
    assert value.item() == pytest.approx(2 * (1 - 1 / 5000), rel=1e-4)


@pytest.mark.parametrize("vocabularies", [(20, 33), (33, 20)])
def test_memory_of_a_chunk_is_bounded_by_the_larger_vocabulary(vocabularies, monkeypatch):
    ours, theirs = vocabularies
    seen: list[tuple[int, ...]] = []
    multiply = torch.mm

    def watched(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        seen.append((left.shape[0], right.shape[1]))
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    none, weights = torch.full((50,), -100), torch.ones(50, dtype=torch.float64)
    linear_distillation(
        *(normal(50, 6), normal(ours, 6), normal(50, 5), normal(theirs, 5), none, 0 * weights, weights),
        divergence="uld",
        chunk_elements=4 * 33,
    )
    assert max(rows for rows, _ in seen) <= 4 * 4 // 8


def test_relation_takes_whole_heads_where_ids_mean_nothing_to_each_other():
    assert compared_ids("uld", 30, 40) == (30, 40)
    assert compared_ids("forward_kl", 30, 40) == (30, 30)
    student, head, teacher, their_head = normal(4, 6), normal(30, 6), normal(4, 5), normal(40, 5)
    objective = Objective(text=0.0, relation=1.0, divergence="uld")
    rows = torch.tensor([2, 3, 4, 5])

    def value(student_gram: Tensor | None, teacher_gram: Tensor | None) -> Tensor:
        return objective(
            *(
                student,
                head,
                Targets(teacher, their_head),
                rows,
                rows // 12,
                rows[:0],
                rows[:0],
                rows,
                torch.ones(1),
                1,
            ),
            student_gram=student_gram,
            teacher_gram=teacher_gram,
        ).loss

    z, t = student @ head.T, teacher @ their_head.T
    expected = 1 - torch.nn.functional.cosine_similarity((z @ z.T).flatten(), (t @ t.T).flatten(), dim=0)
    torch.testing.assert_close(value(None, None), expected, check_dtype=False)
    torch.testing.assert_close(value(gram(head), gram(their_head)), expected, check_dtype=False)
    assert not relation(student, head, teacher, their_head).isclose(expected)  # of the ids that both have


class World:
    """Two samples of 12 positions; the last visual row of the first one also predicts its answer."""

    response = torch.tensor([5, 6, 7, 8, 19, 20])
    paired = torch.tensor([True, False, True, True, False, True])
    visual = torch.tensor([2, 3, 4, 5, 14, 15, 16, 17])
    targets = torch.tensor([1, 2, 3, 4, 5, 6])

    def __init__(self) -> None:
        self.student = normal(24, 6).requires_grad_()
        self.head = normal(30, 6).requires_grad_()
        self.teacher, self.teacher_head = normal(24, 5), normal(41, 5)
        self.teacher_visual = normal(2, 4, 5)

    def run(self, objective: Objective, **options):
        rows = objective.rows(self.response, self.visual)
        targets = Targets(self.teacher[rows], self.teacher_head, visual=self.teacher_visual)
        return objective(
            *(self.student[rows], self.head, targets, rows, rows // 12),
            *(self.response, self.targets, self.visual, torch.ones(2), 2),
            paired=self.paired,
            **options,
        )


def sorted_l1(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (logits.softmax(-1).sort(-1, descending=True).values for logits in (student, teacher))
    return (s - t[..., : s.shape[-1]]).abs().sum(-1) + t[..., s.shape[-1] :].sum(-1)


def test_terms_of_own_rows_match_autograd():
    """Unpaired rows have no response loss, and a row that is a picture's and an answer's has two partners."""
    world = World()
    z, t = world.student @ world.head.T, world.teacher @ world.teacher_head.T
    seen = world.teacher_visual.flatten(0, 1) @ world.teacher_head.T
    response = (sorted_l1(z[[5, 7, 8]], t[[5, 7, 8]]).mean() + sorted_l1(z[[20]], t[[20]]).mean()) / 2
    visual = sorted_l1(z[world.visual], seen).mean()
    related = [
        1 - torch.nn.functional.cosine_similarity((a @ a.T).flatten(), (b @ b.T).flatten(), dim=0)
        for a, b in zip(z[world.visual].split(4), seen.split(4), strict=True)
    ]
    text = -z.log_softmax(-1)[world.response, world.targets]
    expected = {
        "text": (text[:4].mean() + text[4:].mean()) / 2,
        "response": response,
        "visual": visual,
        "relation": sum(related) / 2,
    }
    objective = Objective(text=1.0, response=0.7, visual=0.4, relation=0.5, divergence="uld")
    outcome = world.run(objective)
    for name, value in expected.items():
        torch.testing.assert_close(outcome.terms[name], value.detach(), check_dtype=False)
    whole = torch.stack([getattr(objective, name) * value for name, value in expected.items()]).sum()
    for got, wanted in zip(
        torch.autograd.grad(outcome.loss, (world.student, world.head)),
        torch.autograd.grad(whole, (world.student, world.head)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, check_dtype=False)


def test_zero_for_a_student_that_is_its_own_teacher():
    world = World()
    world.teacher, world.teacher_head = world.student.detach(), world.head.detach()
    world.teacher_visual = world.teacher[world.visual].view(2, 4, 6)
    outcome = world.run(Objective(text=0.0, response=1.0, visual=1.0, relation=1.0, divergence="uld"))
    assert {name: round(float(value), 12) for name, value in outcome.terms.items()} == {
        "response": 0.0,
        "visual": 0.0,
        "relation": 0.0,
    }
