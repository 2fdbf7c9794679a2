"""linear_distillation against ten lines of autograd in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from distilvlm.losses import linear, linear_distillation
from distilvlm.losses.divergences import DIVERGENCES


@dataclass
class Case:
    student: Tensor  # [rows, 8]
    student_head: Tensor  # [vocab, 8]
    teacher: Tensor  # [rows, 12]
    teacher_head: Tensor  # [vocab_teacher, 12]
    labels: Tensor
    text_weight: Tensor
    divergence_weight: Tensor

    def run(self, **options):
        return linear_distillation(*vars(self).values(), **options)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(loss, (self.student, self.student_head))


def case(vocabulary=30, vocabulary_teacher=30, rows=23, dtype=torch.float64, seed=0) -> Case:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, vocabulary, (rows,), generator=draw)
    labels[::3] = -100
    weights = torch.rand(2, rows, generator=draw, dtype=torch.float64)
    weights[0, 1::4] = 0
    weights[1, 2::4] = 0
    weights[:, 5] = 0
    return Case(
        normal(rows, 8).requires_grad_(),
        normal(vocabulary, 8).requires_grad_(),
        normal(rows, 12),
        normal(vocabulary_teacher, 12),
        labels,
        *weights.to(dtype),
    )


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def uld(student: Tensor, teacher: Tensor) -> Tensor:
    """Of logits over vocabularies of any two sizes."""
    ranked = [logits.softmax(-1).sort(-1, descending=True).values for logits in (student, teacher)]
    longest = max(probabilities.shape[-1] for probabilities in ranked)
    s, t = (pad(probabilities, (0, longest - probabilities.shape[-1])) for probabilities in ranked)
    return (s - t).abs().sum(-1)


def reference(case: Case, divergence: str = "forward_kl", temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    common = min(len(case.student_head), len(case.teacher_head))
    student = case.student @ case.student_head.T
    s = (student[:, :common] / temperature).softmax(-1)
    t = ((case.teacher @ case.teacher_head.T)[:, :common] / temperature).softmax(-1)
    value = {
        "forward_kl": lambda: kl(t, s),
        "reverse_kl": lambda: kl(s, t),
        "jensen_shannon": lambda: 0.9 * kl(s, 0.1 * t + 0.9 * s) + 0.1 * kl(t, 0.1 * t + 0.9 * s),
        "skew_forward_kl": lambda: kl(t, 0.1 * t + 0.9 * s),
        "skew_reverse_kl": lambda: kl(s, 0.9 * t + 0.1 * s),
        "uld": lambda: uld(student / temperature, (case.teacher @ case.teacher_head.T) / temperature),
    }[divergence]()
    text = cross_entropy(student, case.labels, reduction="none", ignore_index=-100)
    return (case.text_weight * text + case.divergence_weight * value).sum(), text, value


def close(actual: Tensor, expected: Tensor, tolerance=1e-12) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabularies", [(30, 30), (30, 27), (30, 33)], ids=["same", "teacher-short", "teacher-long"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients_match_autograd(divergence, vocabularies, temperature):
    this = case(*vocabularies)
    expected, text, value = reference(this, divergence, temperature)
    out = this.run(divergence=divergence, temperature=temperature, chunk_elements=5 * 30)
    close(out.loss, expected)
    close(out.text, text * (this.text_weight != 0))
    close(out.divergence, value * (this.divergence_weight != 0))
    for actual, wanted in zip(this.gradients(3 * out.loss), this.gradients(3 * expected), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("mix", [0.3, 0.5])
@pytest.mark.parametrize("divergence", ["jensen_shannon", "skew_forward_kl", "skew_reverse_kl"])
def test_the_share_of_a_mixture_may_be_chosen(divergence, mix):
    this = replace(case(), text_weight=torch.zeros(23))
    s, t = (this.student @ this.student_head.T).softmax(-1), (this.teacher @ this.teacher_head.T).softmax(-1)
    middle = {"skew_forward_kl": mix * t + (1 - mix) * s}.get(divergence, (1 - mix) * t + mix * s)
    value = {
        "jensen_shannon": lambda: mix * kl(s, middle) + (1 - mix) * kl(t, middle),
        "skew_forward_kl": lambda: kl(t, middle),
        "skew_reverse_kl": lambda: kl(s, middle),
    }[divergence]()
    expected = (this.divergence_weight * value).sum()
    out = this.run(divergence=divergence, mix=mix)
    close(out.loss, expected)
    for actual, wanted in zip(this.gradients(out.loss), this.gradients(expected), strict=True):
        close(actual, wanted)


def test_fp32_agrees_with_float64():
    this = case(dtype=torch.float32)
    double = Case(*(x.double().detach().requires_grad_(x.requires_grad) if x.is_floating_point() else x
                    for x in vars(this).values()))  # fmt: skip
    expected = reference(double)[0]
    out = this.run()
    assert out.loss.dtype == out.text.dtype == torch.float32
    close(out.loss, expected, 1e-5)
    for actual, wanted in zip(this.gradients(out.loss), double.gradients(expected), strict=True):
        close(actual, wanted, 1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_zero_when_student_equals_teacher(divergence):
    this = case()
    same = replace(this, teacher=this.student, teacher_head=this.student_head, text_weight=torch.zeros(23))
    out = same.run(divergence=divergence, temperature=1.7)
    close(out.divergence, torch.zeros(23))
    close(this.gradients(out.loss)[0], torch.zeros_like(this.student))


@pytest.mark.parametrize("elements", [1, 7 * 30, 10**6])
def test_chunk_size_does_not_matter(elements, monkeypatch):
    this = case()
    expected = this.run()
    monkeypatch.setattr(linear, "TILE_ELEMENTS", 1 + elements // 3)
    out = this.run(chunk_elements=elements)
    close(out.loss, expected.loss)
    for actual, wanted in zip(this.gradients(out.loss), this.gradients(expected.loss), strict=True):
        close(actual, wanted)


def test_rows_outside_the_masks_do_not_count():
    this = case()
    outside = (this.divergence_weight == 0) & ((this.text_weight == 0) | (this.labels == -100))
    assert outside.any()
    poisoned = replace(
        this,
        student=this.student.detach().masked_fill(outside[:, None], torch.nan).requires_grad_(),
        teacher=this.teacher.masked_fill((this.divergence_weight == 0)[:, None], torch.nan),
    )
    out = poisoned.run()
    close(out.loss, this.run().loss)
    gradient = poisoned.gradients(out.loss)[0]
    assert gradient.isfinite().all() and not gradient[outside].any()


def test_text_alone_needs_no_teacher():
    this = replace(case(), divergence_weight=torch.zeros(23))
    alone = replace(this, teacher=None, teacher_head=None).run()
    close(alone.loss, this.run().loss)
    close(alone.loss, reference(this)[0])
    assert not alone.divergence.any()


def test_text_uses_the_students_whole_vocabulary():
    this = case(30, 27)
    this.labels[this.labels != -100] = 29  # an id that only the student has
    out = this.run()
    close(out.text, reference(this)[1] * (this.text_weight != 0))


@pytest.mark.parametrize("empty", ["no-rows", "no-weights"])
def test_nothing_to_learn_is_zero_and_connected(empty):
    this = case(rows=6)
    this = replace(this, text_weight=torch.zeros(6), divergence_weight=torch.zeros(6))
    if empty == "no-rows":
        rest = {name: tensor[:0] for name, tensor in vars(this).items() if "head" not in name}
        this = replace(this, **rest)
    out = this.run()
    assert out.loss == 0
    for gradient in this.gradients(out.loss):
        assert not gradient.any()


def test_frozen_head_gets_no_gradient_and_costs_none(monkeypatch):
    this = case()
    expected = this.gradients(this.run().loss)[0]
    frozen = replace(this, student_head=this.student_head.detach())

    def refuse(*_):
        raise AssertionError("a gradient of the frozen head was computed")

    monkeypatch.setattr(linear, "_add_outer", refuse)
    close(torch.autograd.grad(frozen.run().loss, this.student)[0], expected)


def test_evaluation_gives_the_same_values_without_gradients(monkeypatch):
    this = case()

    def refuse(*_):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(linear, "_add_outer", refuse)
    with torch.no_grad():
        out = this.run()
    assert not out.loss.requires_grad
    close(out.loss, reference(this)[0])


def test_inputs_are_left_as_they_were():
    this = case()
    before = [tensor.detach().clone() for tensor in vars(this).values()]
    this.run(temperature=2.0).loss.backward()
    for tensor, copy in zip(vars(this).values(), before, strict=True):
        assert torch.equal(tensor, copy)


def test_second_backward_is_refused_not_wrong():
    this = case()
    loss = this.run().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_bf16_heads_are_close_and_reduce_in_fp32():
    this = case(vocabulary=500, vocabulary_teacher=500, dtype=torch.bfloat16)
    double = Case(*(x.double().detach().requires_grad_(x.requires_grad) if x.is_floating_point() else x
                    for x in vars(this).values()))  # fmt: skip
    out, (expected, *_) = this.run(), reference(double)
    assert out.loss.dtype == torch.float32
    close(out.loss, expected, 2e-2)
    for actual, wanted in zip(this.gradients(out.loss), double.gradients(expected), strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual.double() - wanted).norm() < 2e-2 * wanted.norm()


def test_autocast_multiplies_in_bf16_and_keeps_an_fp32_gradient():
    this = case(dtype=torch.float32)
    rounded = replace(
        this,
        student=this.student.bfloat16().float().detach().requires_grad_(),
        student_head=this.student_head.bfloat16().float().detach().requires_grad_(),
        teacher=this.teacher.bfloat16().float(),
        teacher_head=this.teacher_head.bfloat16().float(),
    )
    expected = rounded.run().loss
    with torch.autocast("cpu", torch.bfloat16):
        out = this.run()
        assert torch.equal(out.text, rounded.run().text), "inputs were not rounded to bf16"
    assert abs(out.loss - expected) > 1e-6, "logits were not rounded to bf16"
    close(out.loss, expected, 1e-2)
    for actual, wanted in zip(this.gradients(out.loss), rounded.gradients(expected), strict=True):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"divergence": "total_variation"}, "known are forward_kl"),
        ({}, {"temperature": 0.0}, "temperature must be positive"),
        ({}, {"divergence": "reverse_kl", "mix": 0.5}, "reverse_kl mixes nothing"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, {}, "labels has 4 rows, student_hidden 23"),
        ({"teacher": None, "teacher_head": None}, {}, "there is no teacher"),
        ({"student_head": torch.zeros(30, 8, dtype=torch.float16)}, {}, "cannot work in fp16"),
    ],
)
def test_refusals_say_what_to_do(change, options, message):
    with pytest.raises(ValueError, match=message):
        replace(case(), **change).run(**options)
