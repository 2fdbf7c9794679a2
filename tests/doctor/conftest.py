"""A recipe without any fault, over tiny models with weights of their own; a test adds its one fault by overrides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel

from distilvlm.data import read
from distilvlm.data.stage import stage_data
from distilvlm.doctor import Finding, doctor, examine
from distilvlm.models import build
from distilvlm.models.save import save
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, load_recipe
from distilvlm.recipe.models import ModelSpec
from distilvlm.teachers import LocalTeacher, loading
from tests.runs.tiny import VISION, language, write_recipe

Examine = Callable[..., list[Finding]]


def write_tower(directory: Path, seed: int = 0) -> Path:
    facts = dict(VISION)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModel.from_config(AutoConfig.for_model(facts.pop("model_type"), **facts)).save_pretrained(directory)
    return directory


def write_model(directory: Path, tower: Path, tokenizer: Path, hidden: int, layers: int, trained: bool = True) -> Path:
    """A whole checkpoint; one that trained has a projector with biases that are not 0."""
    parts = {"config": language(hidden, layers), "tokenizer": str(tokenizer)}
    vlm = build(ModelSpec.model_validate({"vision": {"from": str(tower)}, "language": parts}), seed=hidden)
    if trained:
        with torch.no_grad():
            for name, parameter in vlm.model.named_parameters():
                if "projector" in name and name.endswith("bias"):
                    parameter.fill_(0.01)
    save(vlm, directory, "square")
    return directory


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, tokenizer, data and `recipe.yaml`."""
    directory = tmp_path_factory.mktemp("doctor")
    path = write_recipe(directory)
    recipe = yaml.safe_load(path.read_text())
    tower = write_tower(directory / "tower")
    write_model(directory / "teacher", tower, directory / "tokenizer", 24, 3)
    recipe["student"]["vision"] = {"from": str(tower)}
    recipe["teacher"] = {"from": str(directory / "teacher")}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return directory


@pytest.fixture(scope="session")
def models() -> dict[str, VLM]:
    """Models that were built already. They can be used again, because an examination leaves them as they were."""
    return {}


@pytest.fixture(autouse=True)
def build_once(monkeypatch: pytest.MonkeyPatch, models: dict[str, VLM]) -> None:
    def once(spec: ModelSpec, seed: int, **options: Any) -> VLM:
        key = f"{spec.model_dump_json()} {seed} {options}"
        if key not in models:
            models[key] = build(spec, seed, **options)
        return models[key]

    monkeypatch.setattr(loading, "build", once)


@pytest.fixture
def look(place: Path, tmp_path: Path) -> Examine:
    """look({"field": value, ...}) -> the doctor's findings on the recipe with these fields changed."""

    def findings(changes: dict[str, Any] | None = None) -> list[Finding]:
        return doctor(place / "recipe.yaml", changes or {}, tmp_path / "run")

    return findings


@pytest.fixture
def source(place: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """source([(question, answer, pictures), ...]) -> a section for `data.NAME` with the healthy questions and these."""

    def write(rows: list[tuple[str, str, list[str]]], healthy: bool = True, **section: Any) -> dict[str, Any]:
        whole = json.loads((place / "questions.json").read_text()) if healthy else []
        for question, answer, pictures in rows:
            turns = [
                {"from": "human", "value": "<image>\n" * len(pictures) + question},
                {"from": "gpt", "value": answer},
            ]
            whole.append({"image": pictures, "conversations": turns} if pictures else {"conversations": turns})
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(whole))
        return {"path": str(path), "images": str(place / "pictures"), **section}

    return write


def material(place: Path, changes: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """What a run has at hand: recipe, student, teacher, data, reports."""
    recipe: Recipe = load_recipe(place / "recipe.yaml", changes or {})
    student: VLM = build(recipe.student, recipe.seed, dtype=dtype)
    teacher: LocalTeacher | None = None
    if recipe.teacher is not None:
        cpu = torch.device("cpu")
        teacher = LocalTeacher(build(recipe.teacher, recipe.seed), student, cpu, cpu, share_vision=True)
    data = {
        stage.name: stage_data(
            recipe, stage, student.tokenizer, student.layout, [read(recipe.data[name], name) for name in stage.data]
        )
        for stage in recipe.stages
    }
    return recipe, student, teacher, data, {name: stage.check() for name, stage in data.items()}


def examined(*arguments: Any) -> list[Finding]:
    return examine(*arguments, None)


def only(findings: list[Finding], check: str, level: str, *words: str) -> list[Finding]:
    """These findings tell of one fault, and of no other: its name, its level, and what it says."""
    told = [finding for finding in findings if finding.level != "ok"]
    assert {(finding.check, finding.level) for finding in told} == {(check, level)}, told
    for finding in told:
        assert finding.fix, finding
    for word in words:
        assert any(word in f"{finding.text} → {finding.fix}" for finding in told), (word, told)
    return told


def said(findings: list[Finding], check: str) -> list[str]:
    return [finding.text for finding in findings if finding.check == check]
