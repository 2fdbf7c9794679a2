"""What the doctor says of encoders that teach, and of a tower's experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distilvlm.doctor import Finding, doctor
from tests.runs.tiny_move import MIX, TRAINED, write_alone, write_vlm


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_alone(tmp_path_factory.mktemp("alone"), pictures={})


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("vlm"), pictures={})


def found(recipe: Path, check: str, stage: str | None = None, **overrides: Any) -> list[Finding]:
    findings = doctor(recipe, overrides.pop("changes", {}), recipe.parent / "run")
    return [one for one in findings if one.check == check and stage in (None, one.stage)]


def first_stage_only(recipe: Path, place: Path, **changes: Any) -> Path:
    content = yaml.safe_load(recipe.read_text())
    content["stages"] = [content["stages"][0] | changes]
    place.write_text(yaml.safe_dump(content))
    return place


@pytest.mark.parametrize("kind", ["alone", "vlm"])
def test_a_healthy_recipe_says_what_each_teacher_gives_and_whom_it_moves(
    request: pytest.FixtureRequest, kind: str
) -> None:
    recipe = request.getfixturevalue(kind)
    findings = doctor(recipe, directory=recipe.parent / "run")
    faults = [one for one in findings if one.level != "ok" and one.check != "parts.random"]  # the tower is a random one
    assert not faults, faults
    told = [one for one in findings if one.check == "terms.encoder"]
    assert len(told) == 2
    for one in told:
        assert "anchor" in one.text and "cnn" in one.text and "siglip" in one.text
        moved = one.text.partition("gradient: ")[2]
        assert "vision.experts" in moved and "adapters" in moved
    assert "predicting the mean" in next(one for one in findings if one.check == "encoders.rules").text
    assert (
        "0.333 where experts serve alike" in next(one for one in findings if one.check == "terms.expert_balance").text
    )


def test_routers_that_nothing_moves_are_a_warning(alone: Path, tmp_path: Path) -> None:
    loss = {"text": 0.0, "encoder": 1.0}
    recipe = first_stage_only(alone, tmp_path / "recipe.yaml", loss=loss)
    (told,) = found(recipe, "mixture.router")
    assert told.level == "warning" and "expert_balance to 0.01" in told.fix
    scaled = first_stage_only(alone, tmp_path / "scaled.yaml", loss=loss, transform=[MIX | {"routing": "top1_scaled"}])
    assert not found(scaled, "mixture.router")


def test_a_balance_without_experts_is_an_error(alone: Path, tmp_path: Path) -> None:
    recipe = first_stage_only(alone, tmp_path / "recipe.yaml", transform=[], train=["vision", "adapters"])
    (told,) = found(recipe, "mixture.balance")
    assert told.level == "error" and "no layer of the tower has several experts" in told.text
    single = MIX | {"experts": 1}
    recipe = first_stage_only(alone, tmp_path / "one.yaml", transform=[single], train=["vision.experts", "adapters"])
    assert found(recipe, "mixture.balance")[0].level == "error"


def test_experts_that_never_train_are_told(alone: Path, tmp_path: Path) -> None:
    loss = {"text": 0.0, "encoder": 1.0}
    recipe = first_stage_only(alone, tmp_path / "recipe.yaml", train=["adapters"], loss=loss)
    (told,) = found(recipe, "mixture.frozen")
    assert told.level == "warning" and "add 'vision.experts'" in told.fix


def test_a_student_that_is_its_only_teacher_has_nothing_to_learn(alone: Path, tmp_path: Path) -> None:
    recipe = first_stage_only(
        alone,
        tmp_path / "recipe.yaml",
        transform=[],
        train=["vision"],
        loss={"text": 0.0, "encoder": 1.0},
        encoder={"teachers": ["anchor"]},
    )
    (told,) = found(recipe, "terms.positive")
    assert told.level == "error" and "nothing to learn" in told.text


def test_layers_behind_the_one_that_is_read_cannot_have_experts(alone: Path, tmp_path: Path) -> None:
    recipe = first_stage_only(alone, tmp_path / "recipe.yaml", transform=[MIX | {"layers": [2]}], train=TRAINED)
    (told,) = found(recipe, "experts.upcycle")
    assert told.level == "error" and "vision.layer" in told.fix


def test_an_encoder_that_is_not_here_or_cannot_weigh_is_named(alone: Path) -> None:
    absent = {"encoders.cnn.from": str(alone.parent / "absent"), "encoders.cnn.config": None}
    findings = doctor(alone, absent, alone.parent / "run")
    (told,) = [one for one in findings if one.level == "error"]
    assert told.check == "encoders.weights" and "absent" in told.text
    (told,) = found(alone, "encoders.weights", changes={"stages.experts.encoder.importance": "cnn"})
    assert "no attention that could weigh tokens" in told.text
