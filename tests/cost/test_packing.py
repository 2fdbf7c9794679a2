"""Micro-batches of so many positions, padded or packed, as a run makes them."""

from __future__ import annotations

import pytest

from distilvlm.cost import estimate
from distilvlm.cost.shapes import Shapes, of_stage
from distilvlm.data.stage import source_of, stage_data
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.train import objective_of

TOKENS = 96


def of(recipe: Recipe, **machine: object) -> Recipe:
    return recipe.model_copy(update={"machine": recipe.machine.model_copy(update=machine)})


def shapes(recipe: Recipe, student: VLM) -> Shapes:
    stage = recipe.stages[1]
    sources = [source_of(recipe, stage, name) for name in stage.data]
    data = stage_data(recipe, stage, student.tokenizer, student.layout, sources)
    return of_stage(recipe, 1, objective_of(stage), student, data, None, world=1)


def test_the_same_rows_in_fewer_positions(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    padded, by_length, packed = (
        shapes(of(recipe, **machine), models[0])
        for machine in ({"micro_batch": 4}, {"tokens": TOKENS}, {"tokens": TOKENS, "packing": True})
    )
    for found in (by_length, packed):
        assert all(size.positions <= TOKENS for update in found.updates for size in update)
        assert found.largest.input_ids.numel() == max(size.positions for update in found.updates for size in update)
    (positions, rows), *others = (
        [sum(getattr(size, column) for update in one.updates for size in update) for column in ("positions", "rows")]
        for one in (padded, by_length, packed)
    )
    assert all(other[0] < positions and other[1] == rows for other in others)


@pytest.mark.parametrize("away", [False, True])
def test_a_packed_stage_is_estimated(recipe: Recipe, models: tuple[VLM, VLM], away: bool) -> None:
    packed = of(recipe, tokens=TOKENS, packing=True)
    if away:
        data = {name: one.model_copy(update={"path": "no.json", "rows": 40}) for name, one in recipe.data.items()}
        packed = packed.model_copy(update={"data": data})
    (cost,) = estimate(packed, *models, budget=0.5, stages=["dft"])
    assert cost.memory["working"] > 0
    assert cost.seconds_per_update is not None and cost.time["teacher"] > 0
