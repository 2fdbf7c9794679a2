"""Recipes that insert adaptors: what they may say beside that, and the published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distilvlm.recipe import Insert, RecipeError, differences, dump_recipe, load_recipe, read_dump

PUBLISHED = Path(__file__).parents[2] / "recipes" / "iaa.yaml"
SEE: dict[str, Any] = {"do": "insert", "adaptor": "see", "layers": 4}


def stage(name: str, train: list[str], transform: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    optim = {"lr": 1e-4, "batch": 4, "updates": 10}
    return {"name": name, "transform": transform or [], "train": train, "data": ["rows"], "optim": optim}


def written(base: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    content = yaml.safe_load(base.read_text())
    content |= {"stages": list(stages), "presets": {}} | changes
    path = base.with_name("adaptors.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            [stage("one", ["projector", "language"]), stage("two", ["adaptor"], [SEE])],
            "stage 'one' trains 'language', but the recipe inserts an adaptor ('two'), whose base stays as it is",
        ),
        ([stage("one", ["adaptor", "projector"], [SEE])], "behind an insert only 'adaptor' may train"),
        ([stage("one", ["adaptor.layers"])], "neither it nor an earlier stage inserts an adaptor"),
        ([stage("one", ["adaptor"]), stage("two", ["adaptor"], [SEE])], "stage 'one' trains 'adaptor', but neither"),
        ([stage("one", ["adaptor"], [SEE]), stage("two", ["adaptor"], [SEE])], "inserts 'see' again"),
        ([stage("one", ["adaptor"], [SEE, {**SEE, "adaptor": "more"}])], "inserts twice"),
        ([stage("one", ["adaptor"], [{**SEE, "start": "seen"}])], "from 'seen': there is only base"),
        ([stage("one", ["adaptor"], [{**SEE, "adaptor": "text"}])], "'text' is the frozen model without adaptors"),
        ([stage("one", ["adaptor"], [{**SEE, "layer": 3}])], "layer: unknown key; did you mean 'layers'?"),
        ([stage("one", ["adaptor"], [{"do": "insert", "adaptor": "see"}])], "layers: missing"),
        (
            [stage("one", ["adaptor"], [SEE]), stage("two", ["adaptor"], [{"do": "reset", "parts": ["projector"]}])],
            "resets projector behind an insert",
        ),
        (
            [stage("one", ["projector"], [{"do": "upcycle"}]), stage("two", ["adaptor"], [SEE])],
            "'one' upcycles it: make these two recipes",
        ),
    ],
)
def test_what_a_frozen_base_rules_out_is_refused(base: Path, stages: list[dict[str, Any]], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(base, *stages))
    assert expected in str(caught.value)


def test_a_directory_of_adaptors_may_be_trained_on_or_started_from(base: Path) -> None:
    """What it holds is known when it is read."""
    student = {"from": "runs/one/model", "workflow": "see"}
    more = stage("more", ["adaptor"], [{**SEE, "adaptor": "more", "start": "see"}])
    recipe = load_recipe(written(base, stage("on", ["adaptor.layers"]), more, student=student))
    assert recipe.student.workflow == "see" and recipe.stages[1].inserts is not None
    with pytest.raises(RecipeError, match="a composed model has none yet"):
        load_recipe(base, ["student.workflow=see"])


def test_an_insert_says_in_a_line_what_it_does_and_survives_a_dump(base: Path) -> None:
    gated = Insert(do="insert", adaptor="b", layers=[0, 2], structure="b", gate="scalar", start="a")
    assert str(gated) == "insert adaptor 'b': layers behind 0, 2, structure (b), scalar gate, from 'a'"
    assert str(Insert(do="insert", adaptor="a", layers=8)) == "insert adaptor 'a': 8 layers, structure (c)"
    recipe = load_recipe(written(base, stage("one", ["projector"]), stage("two", ["adaptor"], [SEE])))
    assert differences(read_dump(dump_recipe(recipe)), recipe) == []


def test_the_published_recipe_is_the_published_one() -> None:
    recipe = load_recipe(PUBLISHED)
    assert [(one.name, one.train, one.optim.lr) for one in recipe.stages] == [
        ("align-projector", ["projector"], 1e-3),
        ("align", ["adaptor"], 2e-5),
        ("instruct", ["adaptor"], 2e-5),
        ("ground", ["adaptor"], 2e-5),
    ]
    inserts = [one.inserts for one in recipe.stages if one.inserts is not None]
    assert [(one.adaptor, one.structure, one.layers, one.start) for one in inserts] == [
        ("multimodal", "c", "iaa-14", "base"),
        ("grounding", "c", "iaa-14", "multimodal"),
    ]
    assert recipe.student.vision is not None and recipe.student.vision.layer == -2
    assert recipe.pictures.geometry == "pad"
    fewer = load_recipe(PUBLISHED, ["preset=iaa-8,ground-from-base"])
    assert [one.inserts.layers for one in fewer.stages if one.inserts is not None] == [8, 8]
    assert fewer.stages[-1].inserts is not None and fewer.stages[-1].inserts.start == "base"
