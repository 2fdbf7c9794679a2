"""Students with adaptors are asked each set of questions by the workflow that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distilvlm.compare import compare
from distilvlm.data import read
from distilvlm.evaluate import answer, answered
from distilvlm.evaluate.questions import asked_of
from distilvlm.models import load
from distilvlm.recipe import RecipeError, SourceSpec
from tests.runs.tiny_iaa import write_iaa_recipe


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """A student with two adaptors, and one without; a set for each workflow."""
    recipe = yaml.safe_load(write_iaa_recipe(tmp_path).read_text())
    for stage in recipe["stages"]:
        stage |= {"data": ["questions"], "optim": {"lr": 5e-3, "batch": 4, "updates": 1, "warmup": 0.0}}
    (tmp_path / "adaptors.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(recipe | {"stages": recipe["stages"][:1]}))
    asked = {"title": "Colours", "images": "./pictures", "path": "./questions.json", "training": "./questions.json"}
    asked |= {"max_new_tokens": 3, "batch": 8}
    workflows = {"first": "multimodal", "last": None, "alone": "text"}
    content = {
        "name": "tiny",
        "title": "Tiny",
        "runs": [{"name": "adaptors", "recipe": "adaptors.yaml"}, {"name": "plain", "recipe": "plain.yaml"}],
        "questions": {name: {**asked, "workflow": workflow} for name, workflow in workflows.items()},
        "differences": [["adaptors", "plain"]],
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_every_set_is_answered_by_its_workflow(comparison: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(comparison, out)

    def given(questions: str, run: str) -> list[str]:
        return [one.prediction for one in answered(out / f"seed-0/answers/{questions}/{run}.jsonl")]

    spec = SourceSpec(path=str(tmp_path / "questions.json"), images=str(tmp_path / "pictures"))
    records = [question.record for question in asked_of(read(spec, "questions")).questions]
    vlm = load(out / "seed-0/adaptors/model")
    for questions, workflow in (("first", "multimodal"), ("last", "grounding"), ("alone", "text")):
        expected = answer(vlm.use(workflow), records, "chat", "square", batch_size=8, max_new_tokens=3)
        assert given(questions, "adaptors") == expected
    assert given("alone", "adaptors") == given("alone", "plain") == given("first", "plain")
    content = json.loads((out / "comparison.json").read_text())
    gap: dict[str, Any] = content["seeds"][0]["differences"]["alone"]["adaptors - plain"]
    assert (gap["mean"], gap["low"], gap["high"]) == (0, 0, 0)
    sizes = content["models"]
    own = sizes["adaptors"]["parameters"] - sizes["plain"]["parameters"]
    layers = sizes["adaptors"]["language_model_parameters"] - sizes["plain"]["language_model_parameters"]
    assert own == layers + 2 * 544  # the adaptors' projectors


def test_a_workflow_that_no_student_will_have_is_told_before_the_first_run(comparison: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(comparison.read_text())
    content["questions"]["first"]["workflow"] = "multimodel"
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="no adaptor of run 'adaptors': did you mean 'multimodal'"):
        compare(comparison, tmp_path / "out")
    assert not (tmp_path / "out").exists()
