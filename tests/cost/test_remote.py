"""A teacher elsewhere takes neither its weights' memory nor its time here: of it only the head is in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distilvlm.cost import StageCost, estimate
from distilvlm.cost.network import Traffic, question_bytes, traffic
from distilvlm.cost.shapes import Size, of_stage
from distilvlm.data.collate import collate
from distilvlm.models.compose import build
from distilvlm.recipe import load_recipe
from distilvlm.teachers.remote.message import Question
from distilvlm.train import objective_of
from tests.runs.tiny import write_recipe
from tests.teachers.cached_recipe import data_of


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


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_sent_is_counted_to_the_byte(path: Path, packed: bool) -> None:
    """A plan counts what it has not made: pictures are not decoded, and no server is asked."""
    recipe = load_recipe(path)
    student = build(recipe.student, 0, meta=True)
    data = data_of(recipe, student)["dft"]
    assert recipe.teacher is not None
    objective = objective_of(recipe.stages[2], recipe.teacher)
    for indices in ([0, 1, 2, 3], [3]):  # the last has no picture
        batch = collate([data[0, index] for index in indices], packed)
        size = Size.of(batch, objective)
        shown = 0 if batch.pictures is None else len(batch.pictures)
        body = Question.of(batch, objective.rows(batch.response_rows, batch.visual_rows)).pack()
        assert question_bytes(replace(size, pictures=shown), student.layout, packed) == len(body)


def test_the_head_comes_once_and_rows_in_what_the_teacher_is_held_in(path: Path) -> None:
    found: list[Traffic] = []
    for precision in ("fp32", "bf16"):
        recipe = load_recipe(path, {"teacher.kind": "remote", "teacher.remote.url": "http://127.0.0.1:1"})
        assert recipe.teacher is not None
        spec = recipe.teacher.model_copy(update={"precision": precision})
        recipe = recipe.model_copy(update={"teacher": spec})
        student, teacher = (build(one, 0, meta=True) for one in (recipe.student, spec))
        objective = objective_of(recipe.stages[2], recipe.teacher)
        sizes = of_stage(recipe, 2, objective, student, data_of(recipe, student)["dft"], None, 1)
        one = traffic(recipe, recipe.stages[2], student, teacher, sizes)
        assert one is not None
        found.append(one)
    whole, half = found
    assert whole.sent == half.sent and whole.received and whole.once and half.received and half.once
    assert whole.once == pytest.approx(2 * half.once, rel=0.01) and whole.received > 1.8 * half.received
