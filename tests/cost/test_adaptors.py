"""Costs of stages with adaptors are those of all layers that run, and of what trains alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distilvlm.cost import estimate
from distilvlm.cost.memory import Situation, _watch, phases
from distilvlm.cost.scale import filled, inserted, lines, scale_model
from distilvlm.models import build
from distilvlm.models.adaptors import Host
from distilvlm.models.parts import sizes
from distilvlm.models.stages import students, with_adaptor
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Insert, Recipe, load_recipe
from tests.runs.tiny_iaa import STUDENT, write_iaa_recipe

from .test_memory import fake, really, situation


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(write_iaa_recipe(tmp_path_factory.mktemp("cost"), rows=12))


def with_layers(recipe: Recipe, depth: int, **insert: Any) -> VLM:
    """A student with an adaptor, without weights."""
    assert recipe.student.language is not None
    language = recipe.student.language.model_copy(update={"config": {**STUDENT, "num_hidden_layers": depth}})
    plain = build(recipe.student.model_copy(update={"language": language}), 0, meta=True)
    return with_adaptor(plain, Insert(do="insert", adaptor="multimodal", **insert))


def of(recipe: Recipe, student: VLM, index: int = 1, **changes: Any) -> Situation:
    return situation(recipe, (student, student), index, computes_vision=False, **changes)


@pytest.mark.parametrize("structure", ["a", "c"])
def test_tensors_without_memory_take_what_real_ones_take(recipe: Recipe, structure: str) -> None:
    s = of(recipe, with_layers(recipe, 4, layers=2, structure=structure))
    assert fake(s, [0, 1, 2, 3], []) == pytest.approx(really(s, [0, 1, 2, 3], []), rel=0.05)


@pytest.mark.parametrize(
    ("layers", "where", "checkpointing"), [(8, 4, False), (9, [4], True), (6, 6, False), (8, [0, 1, 6], True)]
)
def test_a_few_layers_of_each_kind_tell_of_all(
    recipe: Recipe, layers: int, where: int | list[int], checkpointing: bool
) -> None:
    s = of(recipe, with_layers(recipe, layers, layers=where), checkpointing=checkpointing)
    whole = _watch(s, FakeTensorMode(allow_non_fake_inputs=True), range(layers), 3, [], s.batch)
    assert phases(s) == pytest.approx(whole, rel=0.1)


def test_layers_with_an_inserted_one_are_a_kind_of_their_own(recipe: Recipe) -> None:
    student = with_layers(recipe, 6, layers=[1, 4])
    assert inserted(student) == (1, 4)
    assert lines(student, 1) == [([0, 1], -2.0), ([0, 1, 2, 4], 1.0), ([0, 1, 3], 2.0)]
    scaled = scale_model(student, [0, 4, 5], 1, filled(torch.device("cpu")))
    assert inserted(scaled) == (1,) and scaled.workflow == "multimodal"


def test_backward_passes_go_through_the_frozen_layers(recipe: Recipe) -> None:
    """The base has no gradients and no moments, and its activations are kept all the same."""
    alone = students(recipe, build(recipe.student, 0, meta=True))
    projector, adaptor = (phases(of(recipe, alone[name], index)) for index, name in enumerate(("align", "multimodal")))
    assert adaptor["forward"] > projector["forward"]
    costs = estimate(recipe, build(recipe.student, 0, meta=True), None, measure=False)
    own = 11_472 + 544
    assert [cost.memory["gradients"] for cost in costs] == [4 * 544, 4 * own, 4 * 12_560]
    assert costs[1].memory["optimiser"] == 8 * own
    assert "adaptors" not in costs[0].memory and costs[1].memory["adaptors"] == 4 * own
    assert costs[2].memory["adaptors"] == 4 * (own + 12_560)
    assert costs[0].memory["student"] == costs[2].memory["student"]
    assert sizes(alone["grounding"].model)[0] == 39_216 + 12_560


def test_an_update_takes_time_for_inserted_layers(recipe: Recipe) -> None:
    (cost,) = estimate(recipe, build(recipe.student, 0, meta=True), None, stages=["multimodal"], budget=0.5)
    assert cost.seconds_per_update is not None and cost.time["student"] > 0 and cost.time["optimiser"] > 0


def test_no_model_that_was_timed_stays_in_memory(recipe: Recipe) -> None:
    """A model with adaptors refers to itself, so that it would stay until Python looks for such cycles: beside the run
    whose memory was estimated."""

    def hosts() -> int:
        found = (thing for thing in gc.get_objects() if type(thing) is Host)
        return sum(host.model.device.type != "meta" for host in found)

    gc.collect()
    before = hosts()
    gc.disable()
    try:
        estimate(recipe, build(recipe.student, 0, meta=True), None, stages=["multimodal"], budget=0.5)
        assert hosts() <= before
    finally:
        gc.enable()
