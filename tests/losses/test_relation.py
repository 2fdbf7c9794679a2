"""The relation loss against its definition on logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from distilvlm.losses import gram, linear_distillation, relation
from distilvlm.losses.relation import build_gram, relation_distance, relation_matrix


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(visual: int, width: int = 6, vocabulary: int = 40, vocabulary_teacher: int = 40) -> list[Tensor]:
    return [
        normal(visual, width, seed=1).requires_grad_(),
        normal(vocabulary, width, seed=2).requires_grad_(),
        normal(visual, 9, seed=3),
        normal(vocabulary_teacher, 9, seed=4),
    ]


def reference(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    common = min(len(student_head), len(teacher_head))
    zs, zt = student @ student_head[:common].T, teacher @ teacher_head[:common].T
    return 1 - cosine_similarity((zt @ zt.T).flatten(), (zs @ zs.T).flatten(), dim=0, eps=1e-8)


# Few rows go through logits, many through a Gram matrix.
@pytest.mark.parametrize("visual", [1, 2, 11])
@pytest.mark.parametrize("vocabularies", [(40, 40), (40, 37), (40, 45)], ids=["same", "teacher-short", "teacher-long"])
@pytest.mark.parametrize("prebuilt", [False, True])
def test_value_and_gradients_match_the_definition(visual, vocabularies, prebuilt):
    this = inputs(visual, vocabulary=vocabularies[0], vocabulary_teacher=vocabularies[1])
    common = min(vocabularies)
    grams = (gram(this[1][:common]), gram(this[3][:common])) if prebuilt else ()
    actual, expected = relation(*this, *grams), reference(*this)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    for got, wanted in zip(*(torch.autograd.grad(x, this[:2]) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-9)


def test_zero_when_student_equals_teacher_up_to_scale():
    hidden, head = normal(11, 6), normal(40, 6, seed=1)
    assert abs(relation(3 * hidden, head, hidden, head)) < 1e-12


def test_order_of_the_rows_does_not_matter():
    this = inputs(11)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    shuffled = relation(this[0][order], this[1], this[2][order], this[3])
    torch.testing.assert_close(shuffled, relation(*this))


def test_no_visual_rows_is_zero_and_connected():
    this = inputs(0)
    loss = relation(*this)
    assert loss == 0
    assert not torch.autograd.grad(loss, this[1])[0].any()


def test_a_vanishing_matrix_is_at_distance_one_not_nan():
    hidden, head, *teacher = inputs(5)
    hidden = torch.zeros_like(hidden).requires_grad_()
    loss = relation(hidden, head, *teacher)
    assert loss == 1
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_rows_of_different_number_are_refused():
    this = inputs(5)
    with pytest.raises(ValueError, match=r"student has 5 .* teacher 4"):
        relation(this[0], this[1], this[2][:4], this[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_fp32_symmetric_and_exact(dtype):
    head = normal(300, 13).to(dtype)
    built = gram(head)
    assert built.dtype == torch.float32
    assert torch.equal(built, built.T)
    torch.testing.assert_close(built.double(), head.double().T @ head.double(), atol=1e-4, rtol=1e-5)


def test_gram_of_a_trained_head_is_differentiable():
    head = normal(40, 6).requires_grad_()
    assert torch.autograd.gradcheck(gram, head)
    assert not build_gram(head.detach()).requires_grad


def test_relations_stay_in_fp32_under_autocast():
    this = [tensor.detach().float() for tensor in inputs(11)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = relation(*this), relation(*this, gram(this[1]), gram(this[3]))
    for value in inside:
        torch.testing.assert_close(value, relation(*this), atol=1e-6, rtol=0)


@pytest.mark.parametrize("visual", [3, 11], ids=["through-logits", "through-gram"])
@pytest.mark.parametrize("with_divergence", [True, False])
def test_a_head_that_trains_gets_relation_and_divergence_together(visual, with_divergence):
    """The shared path: two samples' relation matrices beside the other terms, one gradient for the head."""
    student, student_head, teacher, teacher_head = inputs(2 * visual + 3, vocabulary_teacher=37)
    samples = [torch.arange(1, 1 + visual), torch.arange(visual + 2, 2 * visual + 2)]
    rows = 2 * visual + 3
    labels = torch.arange(rows)
    weights = torch.zeros(rows, dtype=torch.float64), torch.full((rows,), float(with_divergence), dtype=torch.float64)
    weights[0][-1] = 0.5
    out = linear_distillation(
        student, student_head, teacher, teacher_head, labels, *weights, chunk_elements=4 * 40, relation_rows=samples
    )
    actual = out.loss
    expected = linear_distillation(student, student_head, teacher, teacher_head, labels, *weights).loss
    for rows, matrix in zip(samples, out.relations, strict=True):
        actual = actual + relation_distance(matrix, relation_matrix(teacher[rows], teacher_head, 37))
        expected = expected + reference(student[rows], student_head, teacher[rows], teacher_head)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    leaves = (student, student_head)
    for got, wanted in zip(*(torch.autograd.grad(2 * x, leaves) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-9)
