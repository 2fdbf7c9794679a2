"""A recipe without a fault: nothing to mend, and what is said of it is true."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from distilvlm.models.fingerprint import fingerprint

from .conftest import Examine, examined, material, said


def test_a_healthy_recipe_has_nothing_to_mend(look: Examine) -> None:
    found = look()
    assert [finding for finding in found if finding.level != "ok"] == []
    assert said(found, "visual.tokens") == [
        "student and teacher: 16 px = 4 visual tokens (hidden state -2, select default)"
    ]
    assert "virtual" in said(found, "vocabulary.image")[0]
    assert said(found, "template.end") == ["chat: an answer ends in '<|im_end|>', which is learned"]
    assert said(found, "settings.reset") == ["resets language, which no earlier stage trains: that changes nothing"]
    assert said(found, "rows.count")[0].startswith("captions 10 rows; 100% with pictures, 10 positions on average")
    assert said(found, "parts.trains")[0].startswith("trains projector 544 float32; frozen: vision")
    assert [f.check for f in found if f.stage == "dft" and f.family == "terms"] == [
        "terms.text",
        "terms.response",
        "terms.visual",
        "terms.relation",
    ]


def test_a_teacher_in_bf16_is_healthy_too(look: Examine) -> None:
    found = look({"teacher.precision": "bf16"})
    assert [finding for finding in found if finding.level != "ok"] == []
    assert "held in bfloat16" in said(found, "parts.teacher")[0]


def test_the_template_is_drawn_as_it_is_learned(look: Examine) -> None:
    drawings = [text.partition("\n")[2] for text in said(look(), "template.picture")]
    assert drawings == [
        "<image>×4⟦a red picture↵⟧",
        "<|im_start|>user↵\n<image>×4↵\nwhat colour is this<|im_end|>↵\n<|im_start|>assistant↵\n⟦red<|im_end|>⟧↵\n"
        "<|im_start|>user↵\nis this the sky<|im_end|>↵\n<|im_start|>assistant↵\n⟦a picture of the sky<|im_end|>⟧↵",
    ]


def test_nothing_is_changed_and_nothing_drawn(place: Path) -> None:
    recipe, student, teacher, data, reports = material(place, {"stages.dft.train": ["projector", "language", "vision"]})
    student.model.train()
    chosen = list(student.model.parameters())
    for index, parameter in enumerate(chosen):
        parameter.requires_grad_(index % 3 == 0)
    gradient = chosen[0].grad = torch.ones_like(chosen[0])
    modes = [module.training for module in student.model.modules()]
    teacher.vlm.model.train()
    models = (student.model, teacher.vlm.model)
    before = [fingerprint(model) for model in models]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    found = examined(recipe, student, teacher, data, reports)

    assert "terms.relation" in {finding.check for finding in found}
    assert [fingerprint(model) for model in models] == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(np.random.get_state(), states[2], strict=True))
    assert [parameter.requires_grad for parameter in chosen] == [index % 3 == 0 for index in range(len(chosen))]
    assert chosen[0].grad is gradient and all(parameter.grad is None for parameter in chosen[1:])
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert [module.training for module in student.model.modules()] == modes
    assert all(module.training for module in teacher.vlm.model.modules())
