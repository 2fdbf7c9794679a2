"""What the doctor says of stages that insert and train adaptors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distilvlm.doctor import Finding, doctor, examine
from distilvlm.models import build, hosted
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.save import save
from distilvlm.models.stages import with_adaptor
from distilvlm.models.vlm import VLM
from distilvlm.recipe import load_recipe
from distilvlm.recipe.models import ModelSpec
from tests.runs.tiny_iaa import GROUNDING, MULTIMODAL, STUDENT, write_iaa_recipe

from .conftest import Examine, material, only, said, write_model, write_tower

OPTIM = {"lr": 5e-4, "batch": 4, "updates": 20}
ALIGN = {"name": "align", "train": ["projector"], "data": ["captions"], "optim": {**OPTIM, "lr": 1e-3}}


def stage(transform: dict[str, Any] | None, train: list[str], name: str = "see", **changes: Any) -> dict[str, Any]:
    before = [] if transform is None else [transform]
    return {"name": name, "transform": before, "train": train, "data": ["questions"], "optim": OPTIM, **changes}


@pytest.fixture(scope="module")
def iaa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with weights, so that nothing of it is noise; tokenizer, data and `recipe.yaml`."""
    directory = tmp_path_factory.mktemp("iaa")
    path = write_iaa_recipe(directory)
    recipe = yaml.safe_load(path.read_text())
    tower = write_tower(directory / "tower")
    parts = {"config": STUDENT, "tokenizer": str(directory / "tokenizer")}
    base = build(ModelSpec.model_validate({"vision": {"from": str(tower)}, "language": parts}), seed=1)
    base.model.model.multi_modal_projector.linear_1.bias.data.fill_(0.01)  # as after training
    save(base, directory / "base", "square")
    write_model(directory / "teacher", tower, directory / "tokenizer", 24, 3)
    recipe["student"] = {"from": str(directory / "base")}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return directory


@pytest.fixture
def look_at(iaa: Path, tmp_path: Path) -> Examine:
    """look_at(*stages) -> the doctor's findings on the recipe with these stages behind its alignment."""

    def findings(*stages: dict[str, Any], **sections: Any) -> list[Finding]:
        recipe = yaml.safe_load((iaa / "recipe.yaml").read_text())
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, "stages": [ALIGN, *stages], **sections}, sort_keys=False))
        return doctor(path, {}, tmp_path / "run")

    return findings


def test_a_fresh_adaptor_is_no_alarm_and_is_explained(look_at: Examine, iaa: Path) -> None:
    """Structure (c) is not the base at first, and its own equal all the same."""
    distilled = {"text": 1.0, "response": 1.0, "visual": 1.0, "relation": 1.0}
    found = look_at(stage(MULTIMODAL, ["adaptor"], loss=distilled), teacher={"from": str(iaa / "teacher")})
    assert not [finding for finding in found if finding.level != "ok"], found
    (told,) = said(found, "adaptors.insert")
    assert "2 layers, structure (c), behind 1, 3: 48,064 bytes" in told and "the base stays as it is" in told
    (start,) = said(found, "adaptors.start")
    assert "layers 1, 3 run twice" in start and "expected" in start
    (trains,) = [text for text in said(found, "parts.trains") if "adaptor" in text]
    assert "trains adaptor 12,016 float32; frozen: vision" in trains and "language 16,752" in trains
    (text,) = said(found, "terms.response")
    assert "against itself" in text and "gradient: adaptor " in text


def test_gates_of_zero_let_layers_learn_as_soon_as_they_train(look_at: Examine) -> None:
    found = look_at(stage(GROUNDING, ["adaptor"]))
    assert not [finding for finding in found if finding.level != "ok"], found
    assert not said(found, "adaptors.start")
    told = only(look_at(stage(GROUNDING, ["adaptor.layers"])), "terms.gradient", "error", "adaptor.layers")
    assert len(told) == 1


@pytest.mark.parametrize(
    ("structure", "words"), [("c", "run the frozen layers twice"), ("b", "are shut out by gates of zero")]
)
def test_layers_that_never_train_are_told(look_at: Examine, structure: str, words: str) -> None:
    insert = {**MULTIMODAL, "structure": structure}
    only(look_at(stage(insert, ["adaptor.projector"])), "adaptors.frozen", "warning", words, "add 'adaptor'")
    later = [stage(insert, ["adaptor.projector"]), stage(None, ["adaptor"], "later")]
    assert not [finding for finding in look_at(*later) if finding.level != "ok"]


def test_the_projectors_rate_is_none_for_inserted_layers(look_at: Examine) -> None:
    fast = {**OPTIM, "lr": 1e-3}
    only(look_at(stage(MULTIMODAL, ["adaptor"], optim=fast)), "adaptors.rate", "warning", "lose their way", "2e-5")
    own = {**OPTIM, "rates": {"adaptor.projector": 1e-3}}
    for healthy in (
        stage(MULTIMODAL, ["adaptor", "adaptor.projector"], optim=own),
        stage(GROUNDING, ["adaptor"], optim=fast),  # gated: it begins as the base
    ):
        assert not [finding for finding in look_at(healthy) if finding.level != "ok"]


@pytest.mark.parametrize(
    ("transform", "train", "check", "words"),
    [
        ({**MULTIMODAL, "layers": 5}, ["adaptor"], "adaptors.insert", "5 layers cannot be inserted behind 4"),
        (MULTIMODAL, ["adaptor.gates"], "settings.parts", "only structures a and b have gates"),
        (MULTIMODAL, ["adaptor.head"], "settings.parts", "tied to the adaptor's embedding"),
        (MULTIMODAL, ["adaptor.layer"], "settings.parts", "did you mean 'adaptor.layers'?"),
    ],
)
def test_what_the_student_lacks_is_an_error(
    look_at: Examine, transform: dict[str, Any], train: list[str], check: str, words: str
) -> None:
    only(look_at(stage(transform, train)), check, "error", words)


def test_a_base_that_would_train_is_an_error(look_at: Examine, iaa: Path, tmp_path: Path) -> None:
    """Of a directory of adaptors, whose recipe does not say that it is one."""
    recipe = load_recipe(iaa / "recipe.yaml")
    vlm = build(recipe.student, recipe.seed)
    for insert in (recipe.stages[1].inserts, recipe.stages[2].inserts):
        assert insert is not None
        with_adaptor(vlm, insert)
    hosted.save(vlm, recipe.student, recipe.seed, tmp_path / "adaptors", "square")
    student = {"from": str(tmp_path / "adaptors")}
    content = yaml.safe_load((iaa / "recipe.yaml").read_text())
    path = tmp_path / "recipe.yaml"

    def findings(train: list[str]) -> list[Finding]:
        stages = [stage(None, train)]
        path.write_text(yaml.safe_dump({**content, "student": student, "stages": stages}, sort_keys=False))
        return doctor(path, {}, tmp_path / "run")

    only(findings(["language"]), "settings.parts", "error", "the base's, which adaptors (multimodal, grounding) leave")
    assert not [finding for finding in findings(["adaptor"]) if finding.level != "ok"]


def test_an_examination_takes_out_what_it_inserted(iaa: Path) -> None:
    recipe, student, _, data, reports = material(iaa)
    before = fingerprint(student.model), hooks(student)
    found = examine(recipe, student, None, data, reports, None)
    assert len(said(found, "terms.text")) == 3
    assert student.host is None and (fingerprint(student.model), hooks(student)) == before
    assert all(parameter.grad is None for parameter in student.model.parameters())


def hooks(student: VLM) -> int:
    """Of what adaptors stand in for; a vision tower has some of transformers' own once it has run."""
    spoken = [*student.model.model.language_model.modules(), student.model.lm_head]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in spoken)
