"""Kernels against torch's way through the same chunk: on a CUDA device, or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from distilvlm.losses import kernels, linear_distillation
from distilvlm.losses.kernels import KINDS, Kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or INTERPRETED),
        reason="needs Triton, and a CUDA device or TRITON_INTERPRET=1",
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
STUDENT, TEACHER = 217, 199


def run(
    vocabularies: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    compared: bool = True,
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = vocabularies

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(DEVICE, dtype)

    hidden, head = random(13, 16).requires_grad_(), (random(ours, 16) / 2).requires_grad_()
    labels = torch.randint(0, ours, (13,), generator=draw)
    labels[::4] = -100
    text, apart = torch.rand(13, generator=draw), torch.rand(13, generator=draw)
    apart[::3] = 0
    weights = text.to(DEVICE), (apart if compared else apart * 0).to(DEVICE)
    teacher = (random(13, 24), random(theirs, 24) / 2) if compared else (None, None)
    out = linear_distillation(
        hidden, head, *teacher, labels.to(DEVICE), *weights, divergence=divergence, temperature=temperature
    )
    out.loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return [out.loss.detach(), out.text, out.divergence, hidden.grad, head.grad]


def by_torch(monkeypatch: pytest.MonkeyPatch, *args: object, **kwargs: object) -> list[Tensor]:
    with monkeypatch.context() as patched:
        patched.setattr(Kernel, "of", staticmethod(lambda *_: None))
        return run(*args, **kwargs)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabularies", [(STUDENT, STUDENT), (STUDENT, TEACHER), (TEACHER, STUDENT)])
def test_the_kernel_gives_what_torch_gives(
    divergence: str, temperature: float, vocabularies: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 64)  # so that a row is several blocks, the last of them not full
    found = run(vocabularies, divergence=divergence, temperature=temperature)
    expected = by_torch(monkeypatch, vocabularies, divergence=divergence, temperature=temperature)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_without_a_teacher_there_is_the_text_term_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 64)
    found, expected = run((STUDENT, STUDENT), compared=False), by_torch(monkeypatch, (STUDENT, STUDENT), compared=False)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_logits_in_bf16_are_reduced_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run((STUDENT, STUDENT), torch.bfloat16)
    expected = by_torch(monkeypatch, (STUDENT, STUDENT), torch.bfloat16)
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(found[3:], expected[3:], strict=True):  # rounded to bf16 behind the same sums
        torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2, rtol=2e-2)


def test_probabilities_that_underflow_give_no_nan() -> None:
    logits = torch.zeros(1, 50, device=DEVICE)
    logits[0, 0] = 300
    teacher = torch.zeros(1, 50, device=DEVICE)
    teacher[0, 1] = 300
    one = torch.ones(1, device=DEVICE)
    label = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for divergence in KINDS:
        kernel = Kernel.of(divergence, None, logits.device, torch.float32)
        assert kernel is not None
        z, text, value = logits.clone(), one.clone(), one.clone()
        kernel(z, teacher, label, one, one, text, value, common=50, temperature=1.0, texted=True)
        assert z.isfinite().all() and text.isfinite().all() and value.isfinite().all(), divergence


def test_float64_and_sorting_go_torch_s_way() -> None:
    device = torch.device(DEVICE)
    assert Kernel.of("forward_kl", None, device, torch.float64) is None
    assert Kernel.of("uld", None, device, torch.float32) is None
