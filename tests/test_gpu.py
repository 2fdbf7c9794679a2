"""What only a CUDA device can show. Everything else is tested without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distilvlm
from distilvlm.losses import gram, linear_distillation, relation
from tests.runs.tiny import write_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_fused_head_is_the_cpu_s() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(40, 16), torch.randn(500, 16)
    teacher_hidden, teacher_head = torch.randn(40, 24), torch.randn(500, 24)
    labels, weight = torch.randint(0, 500, (40,)), torch.rand(40)

    def on(device: str) -> tuple[torch.Tensor, ...]:
        h, w = (t.to(device).requires_grad_() for t in (hidden, head))
        ht, wt = teacher_hidden.to(device), teacher_head.to(device)
        out = linear_distillation(h, w, ht, wt, labels.to(device), weight.to(device), weight.to(device))
        loss = out.loss + relation(h, w, ht, wt, teacher_gram=gram(wt))
        return (loss.detach(), *torch.autograd.grad(loss, (h, w)))

    for ours, theirs in zip(on("cuda"), on("cpu"), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_ends_with_the_same_bits(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    machine = [f"machine.precision={precision}"]
    distilvlm.run(recipe, machine, tmp_path / "whole")
    step, steps = torch.optim.AdamW.step, []

    def interrupted(self: torch.optim.AdamW, *_: object) -> None:
        steps.append(1)
        if len(steps) == 11:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distilvlm.run(recipe, machine, tmp_path / "run")
    monkeypatch.undo()
    distilvlm.run(recipe, machine, tmp_path / "run")
    final = "stages/02-dft/final/weights.safetensors"
    found, expected = load_file(tmp_path / "run" / final), load_file(tmp_path / "whole" / final)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
