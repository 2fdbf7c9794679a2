"""The memory of tensors: counted as it is, extrapolated without loss, growing with what should make it grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distilvlm.cost import estimate
from distilvlm.cost.memory import Live, Situation, _watch, phases
from distilvlm.cost.scale import filled, scale_model, train_only, trained
from distilvlm.cost.shapes import of_stage
from distilvlm.cost.step import Step
from distilvlm.data import read
from distilvlm.data.stage import stage_data
from distilvlm.models import build
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.train import objective_of


def situation(recipe: Recipe, models: tuple[VLM, VLM], index: int = 2, **changes: Any) -> Situation:
    student, teacher = models
    stage = recipe.stages[index]
    objective = objective_of(stage)
    sources = [read(recipe.data[name], name) for name in stage.data]
    data = stage_data(recipe, stage, student.tokenizer, student.layout, sources)
    shapes = of_stage(recipe, index, objective, student, data, None, 1)
    made = Situation(
        student=student,
        teacher=teacher if stage.loss.needs_teacher else None,
        teacher_dtype=torch.float32,
        trains=tuple(stage.train),
        objective=objective,
        batch=shapes.largest,
        computes_vision=True,
        vision_trains=False,
        accumulates=False,
        autocast=None,
        checkpointing=False,
    )
    return replace(made, **changes)


def with_layers(recipe: Recipe, layers: int) -> VLM:
    assert recipe.student.language is not None and recipe.student.language.config is not None
    facts = {**recipe.student.language.config, "num_hidden_layers": layers}
    language = recipe.student.language.model_copy(update={"config": facts})
    return build(recipe.student.model_copy(update={"language": language}), 0, meta=True)


def test_live_counts_what_is_held_and_remembers_the_most() -> None:
    weights = torch.zeros(1000)
    with Live([weights]) as live:
        kept = torch.zeros(10)
        gone = torch.zeros(250)
        view = gone[:5]
        del gone
        assert live.bytes == 40 + 1000  # the view keeps its storage
        del view
        weights.mul_(2)
        weights.view(10, 100)
    assert (live.bytes, live.peak) == (40, 1040)
    del kept
    assert live.bytes == 0


def really(s: Situation, language: list[int], teacher: list[int]) -> dict[str, int]:
    """What a micro-batch takes in each phase on real tensors."""
    make = filled(torch.device("cpu"))
    student = scale_model(s.student, language, 1, make, choosing=s.choosing)
    guide = None if s.teacher is None else scale_model(s.teacher, teacher, 1, make)
    train_only(student.model, trained(student.model, s.trains))
    student.train()
    known = student.tensors
    if guide is not None:
        guide.model.requires_grad_(False)
        known += guide.tensors
    step = Step(student, guide, s.objective, s.batch, s.autocast, torch.device("cpu"))
    grams = step.grams()
    live = Live([*known, *(g for g in grams if g is not None)])
    peaks: dict[str, int] = {}
    names = ["vision"]

    def mark(name: str) -> None:
        peaks[names[-1]] = live.peak
        names.append(name)
        live.restart()

    with torch.random.fork_rng(), live:
        step.run(grams, mark)
        peaks["backward"] = live.peak
    return peaks


def fake(s: Situation, language: list[int], teacher: list[int]) -> dict[str, int]:
    """The same on tensors without memory."""
    return _watch(s, FakeTensorMode(allow_non_fake_inputs=True), language, 1, teacher, s.batch)


def test_tensors_without_memory_take_what_real_ones_take(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    """The same micro-batch with real tensors, counted the same way."""
    s = situation(recipe, models, computes_vision=False)
    # The loss head writes into what it was given, so that a few hundred bytes are counted on one side only.
    assert fake(s, [0, 1], [0, 1, 2]) == pytest.approx(really(s, [0, 1], [0, 1, 2]), rel=0.05)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_two_depths_tell_every_depth(recipe: Recipe, models: tuple[VLM, VLM], autocast: torch.dtype | None) -> None:
    s = situation(recipe, (with_layers(recipe, 5), models[1]), autocast=autocast)
    whole = _watch(s, FakeTensorMode(allow_non_fake_inputs=True), range(5), 3, range(3), s.batch)
    assert phases(s) == pytest.approx(whole, rel=0.05)


def test_more_layers_rows_and_samples_take_more(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    def peak(found: Recipe, student: VLM) -> int:
        (cost,) = estimate(found, student, models[1], stages=["dft"], measure=False)
        return cost.memory["working"] + cost.memory["student"] + cost.memory["optimiser"]

    plain = peak(recipe, models[0])
    assert peak(recipe, with_layers(recipe, 4)) > plain
    machine = recipe.machine.model_copy(update={"micro_batch": 4})
    assert peak(recipe.model_copy(update={"machine": machine}), models[0]) > 1.5 * plain
    plain_template = recipe.data["questions"].model_copy(update={"template": "vicuna"})  # longer prompts
    longer = recipe.model_copy(update={"data": {**recipe.data, "questions": plain_template}})
    assert peak(longer, models[0]) > plain


def test_gradient_checkpointing_takes_less(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    deep = with_layers(recipe, 8)
    kept = phases(situation(recipe, (deep, models[1]), 1))
    computed_again = phases(situation(recipe, (deep, models[1]), 1, checkpointing=True))
    assert computed_again["forward"] < 0.5 * kept["forward"]


def test_frozen_parts_carry_no_gradient_and_no_moments(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    dpt, sft, dft = estimate(recipe, *models, measure=False)
    projector = 16 * 16 + 16 + 16 * 16 + 16
    assert dpt.memory["gradients"] == 4 * projector
    assert dpt.memory["optimiser"] == 8 * projector
    language = sum(p.numel() for p in models[0].model.model.language_model.parameters())
    assert sft.memory["gradients"] == dft.memory["gradients"] == 4 * (projector + language)
    assert sft.memory["teacher"] == 0 < dft.memory["teacher"]


def test_weights_are_counted_in_their_dtype_and_a_shared_tower_once(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    student, teacher = models
    floats = sum(p.numel() for p in teacher.model.parameters()) + sum(b.numel() for b in teacher.model.buffers())
    tower = teacher.model.model.vision_tower
    shared = sum(p.numel() for p in tower.parameters()) + sum(b.numel() for b in tower.buffers())
    assert recipe.teacher is not None
    for precision, size in (("fp32", 4), ("bf16", 2)):
        spec = recipe.teacher.model_copy(update={"precision": precision})
        (cost,) = estimate(recipe.model_copy(update={"teacher": spec}), student, teacher, stages=["dpt"], measure=False)
        assert cost.memory["teacher"] == size * (floats - shared)
