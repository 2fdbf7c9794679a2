"""Sparse students and stages of preferences: counted as they are, with layers of two kinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import distilvlm
from distilvlm.cost import estimate
from distilvlm.cost.memory import Situation, _watch, phases
from distilvlm.cost.meter import bytes_under
from distilvlm.cost.scale import filled, lines, scale_model
from distilvlm.models import build, routing
from distilvlm.models.language import layer_kinds
from distilvlm.models.stages import choosing, students
from distilvlm.models.upcycling import active_parameters, upcycle, upcycled_layers
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, load_recipe
from tests.runs.tiny_mod import STUDENT, write_mod_recipe

from .test_memory import fake, really, situation

D2D, D2S, PD = 0, 1, 2


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(write_mod_recipe(tmp_path_factory.mktemp("mod"), rows=12))


@pytest.fixture(scope="module")
def models(recipe: Recipe) -> tuple[VLM, VLM]:
    assert recipe.teacher is not None
    return build(recipe.student, 0, meta=True), build(recipe.teacher, 0, meta=True)


def with_layers(recipe: Recipe, layers: int, sparse: str | list[int] = "even", experts: int = 4) -> VLM:
    """A sparse student without weights."""
    assert recipe.student.language is not None
    config = {**STUDENT, "num_hidden_layers": layers}
    language = recipe.student.language.model_copy(update={"config": config})
    dense = build(recipe.student.model_copy(update={"language": language}), 0, meta=True)
    return upcycle(dense, experts, 2, sparse)


def of(recipe: Recipe, models: tuple[VLM, VLM], index: int, **changes: Any) -> Situation:
    stage = recipe.stages[index]
    student = students(recipe, models[0])[stage.name]
    s = situation(recipe, (student, models[1]), index, choosing=choosing(recipe, stage), computes_vision=False)
    return replace(s, teacher=s.teacher if index == D2S else None, **changes)


@pytest.mark.parametrize("index", [D2S, PD])
@pytest.mark.parametrize("departures", [[], ["gumbel", "capacity", "padding"]])
def test_tensors_without_memory_take_what_real_ones_take(
    recipe: Recipe, models: tuple[VLM, VLM], index: int, departures: list[str]
) -> None:
    stage = recipe.stages[index].model_copy(update={"reference": departures})
    stages = [stage if number == index else other for number, other in enumerate(recipe.stages)]
    s = of(recipe.model_copy(update={"stages": stages}), models, index)
    assert s.choosing == (("gumbel", 1.5) if departures else ("argmax", None))
    found, seen = fake(s, [0, 1, 2], [0, 1, 2]), really(s, [0, 1, 2], [0, 1, 2])
    assert found == pytest.approx(seen, rel=0.05)


def test_both_passes_of_the_head_are_counted(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    """The second works on the rows whose answers have a slope, which only numbers can tell."""
    s = of(recipe, models, PD, trains=("language",))
    weightless = replace(s.objective, desirable=0.0, undesirable=0.0)  # no slope, and so no second pass
    gradient = 4 * s.student.embedding_rows * 16  # the second pass makes the head's
    once = fake(replace(s, objective=weightless), [0, 1], [])
    assert fake(s, [0, 1], [])["forward"] >= once["forward"] + gradient


@pytest.mark.parametrize(
    ("layers", "sparse", "checkpointing"),
    [(7, "even", True), (8, "second_half", False), (5, "all", True), (8, [4], False)],
)
def test_a_few_layers_of_each_kind_tell_of_all(
    recipe: Recipe, models: tuple[VLM, VLM], layers: int, sparse: str | list[int], checkpointing: bool
) -> None:
    student = with_layers(recipe, layers, sparse)
    s = of(recipe, models, D2S, checkpointing=checkpointing)
    s = replace(s, student=student, teacher=None, objective=replace(s.objective, response=0.0))
    if checkpointing:
        s = replace(s, trains=("projector",))
    whole = _watch(s, FakeTensorMode(allow_non_fake_inputs=True), range(layers), 3, [], s.batch)
    assert phases(s) == pytest.approx(whole, rel=0.1)


def test_gradients_of_earlier_micro_batches_are_no_work_of_this_one(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    """Also where teacher and student differ in depth."""
    s = replace(of(recipe, models, D2S), student=with_layers(recipe, 8), accumulates=True)
    whole = _watch(s, FakeTensorMode(allow_non_fake_inputs=True), range(8), 3, range(3), s.batch)
    assert phases(s) == pytest.approx(whole, rel=0.05)


def test_layers_are_taken_in_rounds_of_one_of_each_kind(recipe: Recipe) -> None:
    # Layers 0, 2, 4 and 6 are sparse: three rounds of both kinds, and one of the sparse kind alone.
    assert lines(with_layers(recipe, 7), 2) == [([0, 1], -2), ([0, 1, 2, 3], 2), ([0, 1, 6], 1)]
    for layers, sparse in ((7, "even"), (6, "all"), (9, [1, 8])):
        model = with_layers(recipe, layers, sparse)
        kinds = layer_kinds(model.model.config.text_config)  # pyright: ignore
        for least in (1, 2, 4):
            cuts = lines(model, least)
            for kind in set(kinds):
                assert sum(n * sum(kinds[at] == kind for at in cut) for cut, n in cuts) == kinds.count(kind)
            assert sum(count for _, count in cuts) == 1
            assert len(cuts[0][0]) >= least


def test_a_scale_model_of_a_sparse_student_is_sparse_where_its_layers_are(recipe: Recipe) -> None:
    whole = with_layers(recipe, 6, "odd")
    model = scale_model(whole, [0, 3, 4, 5], 1, filled(torch.device("cpu")), choosing=("gumbel", 1.25)).model
    assert upcycled_layers(model.config) == [1, 3]
    assert model.config.text_config.mlp_only_layers == [0, 2]  # pyright: ignore
    found = routing.routers(model)
    assert [(router.second_expert, router.capacity) for router in found] == [("gumbel", 1.25)] * 2
    layers = model.model.language_model.layers  # pyright: ignore
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [False, True, False, True]


def test_the_student_is_the_sparse_one_from_the_upcycle_on(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    d2d, d2s, pd = estimate(recipe, *models, measure=False)
    dense, _ = active_parameters(models[0].model)
    sparse = upcycle(models[0], 4, 2).model
    buffers = sum(b.numel() for b in sparse.buffers())
    assert d2d.memory["student"] == 4 * (dense + buffers)
    held = sum(p.numel() for p in sparse.parameters())  # with the shared experts of zeros
    assert d2s.memory["student"] == pd.memory["student"] == 4 * (held + buffers)
    trained = (
        544 + 3 * 3 * 16 * 32 + 2 * 3 * 3 * 16 * 32 + 2 * 4 * 16
    )  # projector, every layer's, further experts, routers
    assert d2s.memory["gradients"] == pd.memory["gradients"] == 4 * trained
    assert d2s.memory["teacher"] > 0 == pd.memory["teacher"]  # its two numbers a record are kept


def test_the_teacher_looks_at_what_a_stage_of_preferences_shows_before_it(
    recipe: Recipe, models: tuple[VLM, VLM]
) -> None:
    d2d, _, pd = estimate(recipe, *models, budget=1.0)
    assert d2d.look is None
    assert pd.look is not None and pd.look.records == 12
    assert pd.look.seconds is not None and 1e-4 < pd.look.seconds < 10
    assert pd.peak_memory_bytes is not None and pd.look.peak_memory_bytes is not None
    teacher = 4 * sum(p.numel() for p in models[1].model.parameters())
    assert pd.look.peak_memory_bytes > pd.memory["process"] + pd.memory["student"] + teacher / 2
    (alone,) = estimate(recipe, models[0], None, stages=["pd"], measure=False)
    assert alone.memory["working"] == pd.memory["working"] > 0  # the stage itself needs no teacher
    assert alone.look is not None and alone.look.peak_memory_bytes is None
    assert any("needs the teacher" in note for note in alone.notes)
    optim = recipe.stages[PD].optim.model_copy(update={"epochs": None, "updates": 1})
    short = recipe.model_copy(
        update={"stages": [*recipe.stages[:PD], recipe.stages[PD].model_copy(update={"optim": optim})]}
    )
    (one_update,) = estimate(short, models[0], None, stages=["pd"], measure=False)
    assert one_update.look is not None and one_update.look.records == optim.batch < 12


def test_z0_of_several_micro_batches_takes_one_more_forward(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    def time(**loss: Any) -> dict[str, float]:
        pd = recipe.stages[PD]
        pd = pd.model_copy(update={"loss": pd.loss.model_copy(update=loss)})
        changed = recipe.model_copy(update={"stages": [*recipe.stages[:PD], pd]})
        (cost,) = estimate(changed, *models, stages=["pd"], budget=0.5)
        return cost.time

    kto = time()
    assert 0 < kto["for z0"] < kto["student"] + kto["loss head"] + kto["vision"]
    assert "for z0" not in time(preference_kind="dpo")
    machine = recipe.machine.model_copy(update={"micro_batch": 4})
    (whole,) = estimate(recipe.model_copy(update={"machine": machine}), *models, stages=["pd"], budget=0.5)
    assert "for z0" not in whole.time  # its one micro-batch is the update


def test_missing_pairs_are_assumed_with_both_answers(recipe: Recipe, models: tuple[VLM, VLM], tmp_path: Path) -> None:
    away = {n: s.model_copy(update={"path": str(tmp_path / "no.json"), "rows": 100}) for n, s in recipe.data.items()}
    (cost,) = estimate(recipe.model_copy(update={"data": away}), *models, stages=["pd"], measure=False)
    assert cost.peak_memory_bytes is not None and cost.updates == 2 * 100 // 4
    assert cost.look is not None and cost.look.records == 100
    assert any("each of its two answers" in note for note in cost.notes)


def test_bytes_on_disk_are_those_of_a_run(tmp_path: Path) -> None:
    path = write_mod_recipe(tmp_path)
    recipe = load_recipe(path)
    assert recipe.teacher is not None
    models = build(recipe.student, 0, meta=True), build(recipe.teacher, 0, meta=True)
    costs = estimate(recipe, *models, measure=False)
    run = distilvlm.run(path, directory=tmp_path / "run")
    for cost, name in zip(costs, ("00-d2d", "01-d2s", "02-pd"), strict=True):
        assert cost.disk["trained"] == pytest.approx(bytes_under(run.directory / "stages" / name / "final"), abs=60)
    assert costs[-1].disk["finished student"] == pytest.approx(bytes_under(run.model), rel=0.02)
    events = sum(cost.disk["events"] for cost in costs)
    assert events == pytest.approx((run.directory / "events.jsonl").stat().st_size, rel=0.1)
    assert costs[-1].look is not None
    kept = bytes_under(run.directory / "references")
    assert costs[-1].look.disk_bytes == pytest.approx(kept, rel=0.1)
