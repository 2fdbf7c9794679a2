"""An estimate says what a run takes, or why it cannot, and leaves everything as it was."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import distilvlm
from distilvlm.cost import Look, Measured, StageCost, compare, estimate, line, load, record
from distilvlm.cost.disk import safetensors_bytes
from distilvlm.cost.meter import bytes_under
from distilvlm.models import build
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, load_recipe
from tests.runs.tiny import write_recipe


def test_nothing_is_drawn_and_nothing_is_left_behind(recipe: Recipe) -> None:
    assert recipe.teacher is not None
    student, teacher = build(recipe.student, 0), build(recipe.teacher, 0)
    student.model.requires_grad_(False).train()
    student.model.lm_head.weight.requires_grad_(True)

    def state() -> list[object]:
        models = [
            (fingerprint(vlm.model), vlm.model.training, [(p.requires_grad, p.grad, p.device.type) for p in ps])
            for vlm in (student, teacher)
            for ps in [list(vlm.model.parameters())]
        ]
        generators = [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]
        settings = [torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")]
        return [models, generators, settings]

    before = state()
    with torch.no_grad():
        costs = estimate(recipe, student, teacher, budget=1.0, stages=["dft"])
    assert state() == before
    assert all(cost.seconds_per_update is not None for cost in costs)


def test_time_is_of_the_right_order(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    costs = estimate(recipe, *models, budget=1.0, stages=["sft", "dft"])
    for cost in costs:
        assert cost.seconds_per_update is not None and 1e-4 < cost.seconds_per_update < 10
        assert sum(cost.time.values()) == pytest.approx(cost.seconds_per_update, rel=1e-6)
        assert cost.seconds == pytest.approx((cost.updates or 0) * cost.seconds_per_update, rel=0.5)
    assert costs[0].time["teacher"] == 0 < costs[1].time["teacher"]


def test_a_missing_teacher_leaves_out_what_needs_it(recipe: Recipe, models: tuple[VLM, VLM]) -> None:
    dpt, sft, _ = estimate(recipe, models[0], None, measure=False)
    assert dpt.peak_memory_bytes is None and "teacher" in dpt.notes[0]
    assert dpt.disk_bytes is not None
    assert sft.peak_memory_bytes is not None


def test_missing_data_is_assumed_and_said_so(recipe: Recipe, models: tuple[VLM, VLM], tmp_path: Path) -> None:
    away = {n: s.model_copy(update={"path": str(tmp_path / "no.json"), "rows": 100}) for n, s in recipe.data.items()}
    (cost,) = estimate(recipe.model_copy(update={"data": away}), *models, stages=["dpt"], measure=False)
    assert cost.peak_memory_bytes is not None
    assert "data is not here" in cost.notes[0]
    assert cost.updates == 2 * 100 // 4


def test_a_machine_that_is_too_small_is_named(
    recipe: Recipe, models: tuple[VLM, VLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distilvlm.cost.language.machine_bytes", lambda _: 10_000_000)
    (cost,) = estimate(recipe, *models, stages=["dpt"], measure=False)
    assert not cost.fits
    assert any("this machine has 10 MB" in note for note in cost.notes)


def test_bytes_on_disk_are_those_of_a_run(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    recipe = load_recipe(path)
    assert recipe.teacher is not None
    models = build(recipe.student, 0, meta=True), build(recipe.teacher, 0, meta=True)
    costs = estimate(recipe, *models, measure=False)
    run = distilvlm.run(path, directory=tmp_path / "run")
    student = build(recipe.student, recipe.seed)
    projector = {n: p for n, p in student.model.named_parameters() if "multi_modal_projector" in n}
    weights = run.directory / "stages" / "00-dpt" / "final" / "weights.safetensors"
    assert safetensors_bytes(projector) == weights.stat().st_size
    for cost, name in zip(costs, ("00-dpt", "01-sft", "02-dft"), strict=True):
        assert cost.disk["trained"] == pytest.approx(bytes_under(run.directory / "stages" / name / "final"), abs=60)
    last = costs[-1]
    assert last.disk["finished student"] == pytest.approx(bytes_under(run.model), rel=0.02)
    events = sum(cost.disk["events"] for cost in costs)
    assert events == pytest.approx((run.directory / "events.jsonl").stat().st_size, rel=0.1)
    assert last.disk["checkpoints"] > 2 * 4 * sum(p.numel() for p in student.model.model.language_model.parameters())


def test_both_stand_side_by_side(tmp_path: Path) -> None:
    cost = StageCost("sft", 1_900_000_000, 1.2, None)
    measured = Measured(2_000_000_000, 1.0, 500)
    assert compare(cost, measured) == {
        "peak_memory_bytes": pytest.approx(-0.05),
        "seconds_per_update": pytest.approx(0.2),
        "disk_bytes": None,
    }
    assert line(cost, measured) == (
        "stage 'sft': 1.9 GB of memory estimated, 2 GB measured (-5%); "
        "1.2 s per update estimated, 1 s measured (+20%); unknown on disk estimated, 500 B measured"
    )
    (tmp_path / "cost.json").write_text(json.dumps(record([cost, StageCost("dft", 1, 1.0, 1)], {"sft": measured})))
    assert load(tmp_path / "cost.json") == {"sft": measured}
    assert load(tmp_path / "none.json") == {}


def test_the_look_of_a_teacher_is_told_before_and_not_after() -> None:
    cost = StageCost("pd", 1_900_000_000, 1.2, 500, look=Look(80_000, 21_000_000_000, 7200.0, 1))
    before = line(cost)
    assert before.endswith(
        "before it, the teacher looks at 80,000 records once: 21 GB of memory, 2 h 0 min in all, estimated"
    )
    assert "looks" not in line(cost, Measured(1, 1.0, 1))
    unknown = StageCost("pd", 1, None, 1, look=Look(None, None, None, None))
    assert line(unknown).endswith("its records once: unknown of memory, unknown in all, estimated")
    assert record([cost], {})["stages"][0]["look"]["records"] == 80_000
