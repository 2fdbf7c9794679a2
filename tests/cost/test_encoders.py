"""What encoders that teach cost, and a stage of pictures alone: counted as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import distilvlm
from distilvlm.cost import StageCost, estimate
from distilvlm.cost.encoders import seeing, teaching
from distilvlm.cost.memory import Live, parameter_bytes
from distilvlm.models import forward
from distilvlm.models.alone import Encoder
from distilvlm.models.compose import build_student
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, load_recipe
from distilvlm.runs.plan import plan
from distilvlm.teachers.encoder_cache import kept_bytes
from distilvlm.teachers.encoders import EncoderTeachers, shapes
from distilvlm.train.encoders import adapt
from tests.runs.tiny_move import write_alone, write_vlm


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(write_alone(tmp_path_factory.mktemp("alone"), pictures={}))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(write_vlm(tmp_path_factory.mktemp("vlm"), pictures={}))


def student_of(recipe: Recipe, meta: bool = True) -> VLM | Encoder:
    student = build_student(recipe.student, recipe.seed, meta=meta)
    adapt(recipe, student, shapes(recipe, student))
    return student


def costs(recipe: Recipe, measure: bool = False, stages: list[str] | None = None) -> list[StageCost]:
    return estimate(recipe, student_of(recipe), None, budget=1.0, measure=measure, stages=stages)


def cached(recipe: Recipe, place: Path) -> Recipe:
    return Recipe.model_validate(recipe.model_dump(by_alias=True) | {"cache": {"path": str(place)}})


def test_encoders_are_counted_weight_by_weight(alone: Recipe) -> None:
    student = build_student(alone.student, alone.seed)
    teachers = EncoderTeachers(alone, student, torch.device("cpu"))
    held = sum(parameter_bytes(one.model, torch.float32) for one in teachers.encoders.values())
    found = teaching(alone, alone.stages[0], student_of(alone), shapes(alone, student), pictures=2)
    assert found.held == held and found.operations > 0 and found.cached is None
    again = teaching(alone, alone.stages[0], student_of(alone), shapes(alone, student), pictures=4)
    assert again.operations == found.operations and again.looking > 1.5 * found.looking


def test_a_tower_takes_what_it_really_takes(alone: Recipe) -> None:
    student = student_of(alone, meta=False)
    counted, operations = seeing(student, 3, trains=True, checkpointing=False)
    _, once = seeing(_frozen(student), 3, trains=False, checkpointing=False)
    # Forward, and twice as much back through two of the three blocks: the last is behind the layer that is read.
    assert 2 * once < operations < 3 * once
    student.model.requires_grad_(True)
    canvases = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    with Live([*student.model.parameters(), *student.model.buffers(), canvases]) as live:
        forward.vision_features(student.model, student.layout, canvases).float().square().mean().backward()
    gradients = sum(4 * p.numel() for p in student.model.model.vision_tower.parameters())
    assert counted + gradients == pytest.approx(live.peak, rel=0.1)


def _frozen(student: VLM | Encoder) -> VLM | Encoder:
    bare = student.without_weights()
    bare.model.requires_grad_(False)
    return bare


@pytest.mark.parametrize(("kind", "stage"), [("alone", "experts"), ("vlm", "pretrain")])
def test_with_a_cache_teachers_take_disk_instead_of_memory_and_time(
    request: pytest.FixtureRequest, kind: str, stage: str, tmp_path: Path
) -> None:
    recipe: Recipe = request.getfixturevalue(kind)
    measure = kind == "alone"
    (online,), (kept,) = (costs(one, measure, [stage]) for one in (recipe, cached(recipe, tmp_path)))
    assert online.memory["encoders"] > 0 and kept.memory["encoders"] == 0
    assert online.updates == 3 and online.disk_bytes == kept.disk_bytes
    assert any("the cache of encoders' features takes" in note for note in kept.notes)
    if measure:
        assert online.time["encoders"] > 0 and not kept.time["encoders"]
        assert online.seconds is not None and kept.seconds is not None and online.seconds > kept.seconds


def test_the_disk_is_as_written(alone: Recipe, tmp_path: Path) -> None:
    short = alone.model_copy(update={"stages": alone.stages[:1]})
    run = distilvlm.run(short, directory=tmp_path / "run")
    (expected,) = costs(short)
    weights = run.directory / "stages" / "00-experts" / "final" / "weights.safetensors"
    assert expected.disk["trained"] == pytest.approx(weights.stat().st_size, rel=0.05)
    model = sum(file.stat().st_size for file in (run.directory / "model").iterdir())
    beside = (run.directory / "adapters" / "adapters.safetensors").stat().st_size
    assert expected.disk["finished student"] == pytest.approx(model + beside, rel=0.15)
    assert expected.disk["events"] == pytest.approx((run.directory / "events.jsonl").stat().st_size, rel=0.25)


def test_a_plan_says_what_each_encoder_gives_and_what_keeping_it_takes(
    alone: Recipe, vlm: Recipe, tmp_path: Path, shown: Callable[[Recipe], str]
) -> None:
    found = plan(cached(alone, tmp_path))
    cnn = next(one for one in found.encoders if one.name == "cnn")
    assert (cnn.size, cnn.grid, cnn.channels) == (24, (3, 3), 12)
    recipe = cached(alone, tmp_path)
    assert recipe.cache is not None
    assert cnn.bytes == kept_bytes(recipe.cache, shapes(recipe, student_of(recipe))["cnn"]) == 150 + 9 * 12 * 2
    parts = {part.name: part.parameters for part in found.stages[0].trains}
    assert set(parts) == {"vision.experts", "vision.router", "adapters"} and all(parts.values())
    first = found.stages[0]
    assert first.parameters is not None and first.active is not None
    assert first.parameters - first.active == pytest.approx(parts["vision.experts"] * 2 / 3, abs=2)  # one of three
    assert first.rows["encoder"] == 4
    text = shown(vlm)
    assert "encoder cnn: random convnext at 24 px, 3×3 tokens of 12 channels" in text


def test_a_plan_goes_on_without_encoders_that_are_not_here(alone: Recipe, tmp_path: Path) -> None:
    content = alone.model_dump(by_alias=True)
    content["encoders"]["cnn"] = {"from": str(tmp_path / "absent")}
    recipe = Recipe.model_validate(content)
    found = plan(recipe)
    missing = next(one for one in found.encoders if one.name == "cnn")
    assert missing.missing is not None and "absent" in missing.missing
    student = build_student(recipe.student, recipe.seed, meta=True)
    adapt(recipe, student, shapes(recipe, student, {}))
    (cost,) = estimate(recipe, student, None, measure=False, stages=["experts"])
    assert cost.memory["encoders"] > 0 and any("encoders that are not here: cnn" in note for note in cost.notes)


@pytest.fixture
def shown() -> Callable[[Recipe], str]:
    from rich.console import Console

    from distilvlm.runs.plan_table import print_plan

    def show(recipe: Recipe) -> str:
        console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
        print_plan(plan(recipe), console)
        return console.export_text()

    return show
