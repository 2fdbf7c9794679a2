"""A teacher elsewhere takes neither its weights' memory nor its time here: of it only the head is in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilvlm.cost import StageCost, estimate
from distilvlm.models.compose import build
from distilvlm.recipe import load_recipe
from tests.runs.tiny import write_recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("remote"))


def cost(path: Path, **changes: object) -> StageCost:
    recipe = load_recipe(path, changes)
    assert recipe.teacher is not None
    student, teacher = (build(spec, 0, meta=True) for spec in (recipe.student, recipe.teacher))
    (found,) = estimate(recipe, student, teacher, device="cpu", measure=False, stages=["dft"])
    return found


def test_only_its_head_is_in_memory(path: Path) -> None:
    remote = {"teacher.kind": "remote", "teacher.remote.url": "http://127.0.0.1:1"}
    here, there = cost(path), cost(path, **remote)
    spec = load_recipe(path).teacher
    assert spec is not None
    head = build(spec, 0, meta=True).model.lm_head.weight
    assert there.memory["teacher"] == head.numel() * 4 < here.memory["teacher"]
    assert there.memory["working"] <= here.memory["working"]
    assert there.look is None and any("teacher elsewhere" in note for note in there.notes)
    likely = {"teacher.remote.protocol": "openai", "stages.2.loss.visual": 0.0, "stages.2.loss.relation": 0.0}
    likely |= {"stages.0.loss.visual": 0.0, "stages.0.loss.relation": 0.0}
    assert cost(path, **remote, **likely).memory["teacher"] == 0
