"""The recipes that come with the package hold the published numbers of LLaVA-KD."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
import yaml

from distilvlm.recipe import Departure, Recipe, StageSpec, dump_recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
COMPARISONS = ["photos", "llava-mod-small", "iaa-small", "move-kd-small"]  # each of its runs has its own recipe
FILES = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.stem not in COMPARISONS]
PUBLISHED = ["llava-kd", "llava-kd-teacher", "pt-sft", "pt-sft-sft"]
CAPTIONS, INSTRUCTIONS = 558_128, 665_298


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER", raising=False)
    monkeypatch.delenv("LLAVA_DATA", raising=False)


def load(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def updates(recipe: Recipe, stage: StageSpec) -> int:
    """Whole updates of a stage, the incomplete last one not counted (as the published counts)."""
    assert stage.optim.epochs == 1
    return sum(recipe.data[name].rows for name in stage.data) // stage.optim.batch


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_loads_with_every_preset_and_survives_a_dump(path: Path, tmp_path: Path) -> None:
    presets = yaml.safe_load(path.read_text(encoding="utf-8")).get("presets") or {}
    for overrides in [[], *([f"preset={name}"] for name, value in presets.items() if value is not None)]:
        recipe = load_recipe(path, overrides)
        (tmp_path / "dump.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(tmp_path / "dump.yaml") == recipe


def test_the_published_recipes_are_there() -> None:
    assert set(PUBLISHED) <= {path.stem for path in FILES}


@pytest.mark.parametrize("name", PUBLISHED)
def test_common_numbers(name: str) -> None:
    recipe = load(name)
    assert recipe.seed == 1234
    assert recipe.pictures.geometry == "square"
    vision = recipe.student.vision
    assert (vision.source, vision.size, vision.layer) == ("google/siglip-so400m-patch14-384", 384, -2)
    assert vision.select == "default"  # the published 728 of 729 visual tokens
    assert (recipe.student.projector.activation, recipe.student.projector.init_std) == ("gelu", 0.02)
    assert (recipe.data["captions"].rows, recipe.data["captions"].template) == (CAPTIONS, "plain")
    assert (recipe.data["instructions"].rows, recipe.data["instructions"].template) == (INSTRUCTIONS, "vicuna")
    for stage in recipe.stages:
        optim = stage.optim
        assert (optim.schedule, optim.warmup, optim.weight_decay, optim.clip) == ("cosine", 0.03, 0.0, None)
        assert (optim.betas, optim.eps) == ((0.9, 0.999), 1e-8)
        assert stage.max_length == 2048
        pretraining = stage.data == ["captions"]
        assert stage.train == (["projector"] if pretraining else ["projector", "language"])
        assert (optim.lr, optim.batch) == ((1e-3, 256) if pretraining else (2e-5, 128))
        assert stage.order == ("random" if pretraining else "grouped")
        assert updates(recipe, stage) == pytest.approx(2180 if pretraining else 5198, abs=1)


def test_the_student_run_is_dpt_sft_dft() -> None:
    recipe = load("llava-kd")
    assert [stage.name for stage in recipe.stages] == ["dpt", "sft", "dft"]
    assert [stage.data for stage in recipe.stages] == [["captions"], ["instructions"], ["instructions"]]
    assert [stage.loss.needs_teacher for stage in recipe.stages] == [True, False, True]
    assert [[t.parts for t in stage.transform] for stage in recipe.stages] == [[], [["language"]], []]
    assert recipe.student.language.source == "Qwen/Qwen2.5-0.5B"
    assert recipe.teacher.source == "runs/llava-kd-teacher/model"


@pytest.mark.parametrize(("chosen", "relation"), [([], 0.5), (["preset=paper"], 0.5), (["preset=code"], 1.0)])
def test_weights_of_paper_and_code(chosen: list[str], relation: float) -> None:
    for stage in load("llava-kd", *chosen).stages:
        loss = stage.loss
        if loss.needs_teacher:
            assert (loss.text, loss.response, loss.visual, loss.relation) == (1.0, 1.0, 1.0, relation)
            assert loss.temperature == 1.0


@pytest.mark.parametrize(
    ("pair", "student", "teacher"),
    [
        ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", "runs/llava-kd-teacher/model"),
        ("qwen1.5-0.5b", "Qwen/Qwen1.5-0.5B", "runs/llava-kd-teacher-qwen1.5-4b/model"),
        ("qwen1.5-1.8b", "Qwen/Qwen1.5-1.8B", "runs/llava-kd-teacher-qwen1.5-4b/model"),
    ],
)
def test_the_other_pairs_combine_with_the_weights(pair: str, student: str, teacher: str) -> None:
    recipe = load("llava-kd", f"preset={pair},code")
    assert (recipe.student.language.source, recipe.teacher.source) == (student, teacher)
    assert recipe.stages[2].loss.relation == 1.0


def test_the_teacher_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER", "/models/teacher")
    assert load("llava-kd").teacher.source == "/models/teacher"


@pytest.mark.parametrize(
    ("name", "stages", "language"),
    [
        ("llava-kd-teacher", ["pt", "sft"], "Qwen/Qwen2.5-3B"),
        ("pt-sft", ["pt", "sft"], "Qwen/Qwen2.5-0.5B"),
        ("pt-sft-sft", ["pt", "sft", "sft-again"], "Qwen/Qwen2.5-0.5B"),
    ],
)
def test_teacher_and_controls_learn_from_text_alone(name: str, stages: list[str], language: str) -> None:
    recipe = load(name)
    assert recipe.teacher is None
    assert recipe.student.language.source == language
    assert [stage.name for stage in recipe.stages] == stages
    assert not any(stage.loss.needs_teacher or stage.transform for stage in recipe.stages)


@pytest.mark.parametrize("name", ["pt-sft", "pt-sft-sft"])
def test_a_control_of_another_pair_stays_without_a_teacher(name: str) -> None:
    recipe = load(name, "preset=qwen1.5-1.8b")
    assert recipe.teacher is None
    assert recipe.student.language.source == "Qwen/Qwen1.5-1.8B"


def test_the_fair_control_makes_as_many_updates_as_the_distilled_student() -> None:
    distilled, control = load("llava-kd"), load("pt-sft-sft")
    counts = [[updates(recipe, stage) for stage in recipe.stages] for recipe in (distilled, control)]
    assert counts[0] == counts[1]


# LLaVA-MoD: specification §2.1


def test_llava_mod_has_the_published_stages() -> None:
    recipe = load("llava-mod")
    assert [stage.name for stage in recipe.stages] == ["init", "d2d", "d2s", "pd"]
    init, d2d, d2s, pd = recipe.stages
    assert [stage.loss.weights for stage in recipe.stages] == [
        {"text": 1.0},
        {"response": 1.0},
        {"text": 1.0, "response": 1.0, "balance": 0.01},
        {"balance": 0.01, "preference": 1.0},
    ]
    assert (pd.loss.preference_kind, pd.loss.beta) == ("kto", 0.1)
    assert init.train == ["projector"] and d2d.train == ["projector", "language"]
    assert d2s.train == pd.train == ["projector", "language.feed_forward", "language.router"]
    how = d2s.upcycles
    assert how is not None and (how.experts, how.top_k, how.layers) == (4, 2, "even")
    assert [stage.optim.lr for stage in recipe.stages] == [1e-4, 2e-5, 2e-5, 2e-6]
    assert [stage.optim.batch for stage in recipe.stages] == [512, 256, 256, 256]
    assert all(stage.optim.betas == (0.9, 0.98) and stage.reference == [] for stage in recipe.stages)
    assert recipe.pictures.geometry == "pad" and recipe.data["preferences"].rows == 83_132


def test_llava_mods_code_is_a_preset() -> None:
    recipe = load("llava-mod", "preset=qwen2-0.5b,code")
    assert [stage.optim.lr for stage in recipe.stages] == [1e-3, 2e-5, 2e-5, 2e-6]
    assert [stage.optim.batch for stage in recipe.stages] == [256, 128, 128, 128]  # on 16 GPUs
    assert all(stage.optim.betas == (0.9, 0.999) and stage.optim.epochs == 1 for stage in recipe.stages)
    switches = {switch for stage in recipe.stages for switch in stage.reference}
    assert switches == {*typing.get_args(Departure)}
    assert recipe.student.language is not None and recipe.student.language.source == "Qwen/Qwen2-0.5B"


def test_llava_mods_teacher_is_llava_1_5_with_qwen2() -> None:
    recipe = load("llava-mod-teacher")
    assert [(s.name, s.optim.lr, s.optim.batch) for s in recipe.stages] == [("pt", 1e-3, 256), ("sft", 2e-5, 128)]
    assert (recipe.data["captions"].rows, recipe.data["instructions"].rows) == (CAPTIONS, INSTRUCTIONS)
    assert recipe.student.language is not None and recipe.student.language.source == "Qwen/Qwen2-7B"
