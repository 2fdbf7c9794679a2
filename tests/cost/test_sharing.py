"""What a process holds of a student that several share: rows of what they split, and what is whole while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distilvlm.cost.memory import _watch, parameter_bytes
from distilvlm.cost.scale import trained
from distilvlm.cost.sharing import Sharing
from distilvlm.models import forward
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.recipe.schema import MachineSpec

from .test_memory import situation, with_layers

CPU, CARD = torch.device("cpu"), torch.device("cuda")


def sharing(vlm: VLM, processes: int, device: torch.device = CPU, train: str = "language", **machine: Any) -> Sharing:
    members = trained(vlm.model, ["projector", train])
    return Sharing(vlm, members, MachineSpec(**{"parallel": "fsdp", **machine}), processes, device)


def test_rows_are_divided_and_a_frozen_tower_is_not(models: tuple[VLM, VLM]) -> None:
    student = models[0]
    whole = parameter_bytes(student.model, torch.float32)
    tower = parameter_bytes(student.model.model.vision_tower, torch.float32)
    for processes in (2, 4):  # which divide all sizes of these models but that of the vocabulary
        (held,) = sharing(student, processes).trees
        assert tower + (whole - tower) / processes <= held < tower + 1.1 * (whole - tower) / processes
    ((frozen,), (trains,)) = (sharing(student, 2, train=part).trees for part in ("language", "vision"))
    assert trains < frozen - 0.4 * tower


def test_offloaded_rows_are_beside_the_card(models: tuple[VLM, VLM]) -> None:
    here, away = (sharing(models[0], 2, CARD, offload=offload) for offload in (False, True))
    assert away.gradients == here.waiting == 0 < here.gradients
    assert away.waiting == here.trees[0] - away.trees[0] + 3 * here.gradients
    assert away.notes and not here.notes
    on_a_cpu = sharing(models[0], 2, CPU, offload=True)
    assert (on_a_cpu.trees, on_a_cpu.gradients, on_a_cpu.waiting) == (here.trees, here.gradients, 0)


def test_only_layers_that_run_are_gathered(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    exact, rounded = (sharing(models[0], 2, precision=precision) for precision in ("fp32", "bf16"))
    working = 10**9
    (apart,) = exact.beside(working, runs=False).values()
    layers = [sharing.beside(working)["gathered"] - apart for sharing in (exact, rounded)]
    layer = sum(p.numel() for p in forward.layers(models[0].model)[0].parameters())
    assert layers == [(2 * 4 + 8) * layer, (2 * 2 + 6) * layer]
    deep = sharing(with_layers(recipe, 8), 2)
    assert deep.beside(working) == exact.beside(working)  # whatever the depth


def test_one_process_shares_nothing_and_ddp_has_gradients_once_more(models: tuple[VLM, VLM]) -> None:
    whole = parameter_bytes(models[0].model, torch.float32)
    alone, ddp = sharing(models[0], 1), sharing(models[0], 2, parallel="ddp")
    assert alone.trees == ddp.trees == [whole] and alone.beside(0) == {}
    assert ddp.beside(0) == {"buckets": ddp.gradients} and alone.gradients == ddp.gradients > 0


def test_rounded_copies_of_layers_do_not_add_up(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    made, mode = situation(recipe, models, 1, autocast=torch.bfloat16), FakeTensorMode(allow_non_fake_inputs=True)
    whole, split = (
        _watch(replace(made, split=split), mode, [0, 1], 1, [], made.batch)["forward"] for split in (False, True)
    )
    assert split < whole
