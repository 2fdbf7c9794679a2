"""Weights of sources in a recipe: the plan, the run and the data report count alike."""

from __future__ import annotations

import json

import pytest

from distilvlm.recipe import RecipeError, load_recipe
from distilvlm.runs.execute import run
from distilvlm.runs.plan import plan
from tests.runs.tiny import write_recipe

STAGE = {
    "name": "sft",
    "train": ["projector"],
    "data": ["captions", "questions"],
    "optim": {"lr": 0.01, "batch": 4, "epochs": 2},
}


def test_plan_and_run_agree_on_the_updates_of_a_mixture(tmp_path):
    recipe = write_recipe(tmp_path, rows=10, teacher=None, stages=[STAGE])
    overrides = ["data.captions.weight=0.5", "data.questions.weight=1.5"]
    # 5 + 15 samples an epoch, 4 an update, 2 epochs
    planned = plan(recipe, overrides).stages[0]
    assert (planned.samples, planned.updates) == (20, 10)
    run(recipe, overrides, tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["samples"] for event in events if event["event"] == "update"] == [4] * 10


def test_a_weight_must_be_more_than_nothing(tmp_path):
    recipe = write_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"data\.captions\.weight"):
        load_recipe(recipe, ["data.captions.weight=0"])
