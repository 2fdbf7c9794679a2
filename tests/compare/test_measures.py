"""Boxes and text alone in a comparison: asked, kept, compared, reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distilvlm.compare import compare, load_comparison
from distilvlm.recipe import RecipeError
from tests.runs.tiny import write_recipe

BOX = {"boxes": [[0, 0, 4, 4]], "size": [8, 8]}


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """A projector that trains beside a frozen language model, with two learning rates; boxes, an exam, a text."""
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    stage = {"name": "align", "train": ["projector"], "data": ["questions"]}
    stage["optim"] = {"lr": 0.01, "batch": 4, "updates": 2}
    recipe = {key: value for key, value in recipe.items() if key not in ("teacher", "stages")} | {"stages": [stage]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    name = json.loads((tmp_path / "questions.json").read_text())[0]["image"]
    talk = [{"from": "human", "value": "<image>\nwhere is it?"}, {"from": "gpt", "value": "[0.00, 0.00, 0.50, 0.50]"}]
    (tmp_path / "boxes.json").write_text(json.dumps([{"image": name, "conversations": talk, "meta": BOX}] * 2))
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        (tmp_path / "mmlu" / split / f"law_{split}.csv").write_text("what is red?,a,b,c,d,A\nwhat is it?,a,b,c,d,C\n")
    (tmp_path / "held-out.txt").write_text("what colour is it? it is red, and the other one is green")
    asked = {"images": "./pictures", "training": "./boxes.json", "max_new_tokens": 32}
    content = {
        "name": "measures",
        "title": "Measures",
        "runs": [
            {"name": "one", "recipe": "recipe.yaml"},
            {"name": "two", "recipe": "recipe.yaml", "set": {"stages.align.optim.lr": 0.02}},
        ],
        "questions": {
            "boxes": {"title": "Boxes", "path": "./boxes.json", "measure": "grounding", **asked},
            "law": {"title": "Law", "path": "./mmlu", "measure": "choices", "task": "mmlu", "shots": 1},
            "prose": {"title": "Prose", "path": "./held-out.txt", "measure": "perplexity", "window": 16},
        },
        "differences": [["one", "two"], ["one", "majority"]],
    }
    (tmp_path / "measures.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "measures.yaml"


def test_boxes_and_text_are_asked_kept_and_reported(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = compare(comparison, out)
    told = json.loads((out / "comparison.json").read_text())["seeds"][0]
    assert list(told["rows"]["boxes"]) == ["majority", "question-only", "one", "two"]
    assert told["rows"]["boxes"]["majority"]["acc"]["mean"] == 1
    assert list(told["rows"]["law"]) == list(told["rows"]["prose"]) == ["one", "two"]  # nobody is blind to text
    # The language model of both is the same frozen one: what it knows has not changed by a bit.
    for name in ("law", "prose"):
        assert told["differences"][name] == {"one - two": {"mean": 0, "low": 0, "high": 0}}
    assert told["rows"]["law"]["one"]["n"] == 2 and told["rows"]["prose"]["one"]["perplexity"]["mean"] > 1
    table = (out / "table.md").read_text()
    assert "prose, 4 questions, perplexity per token (lower is better)" in table
    assert "boxes, 2 questions on 1 pictures, acc@0.5 in %" in table
    page = (out / "report.html").read_text()
    value = told["rows"]["prose"]["one"]["perplexity"]["mean"]
    assert f"<b>{value:.2f}</b>" in page and "paired differences of perplexity per token, below 0 is better" in page
    assert "Prose" in page and "all models wrong" not in page.split("Samples side by side")[1].split("Prose")[-1]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    for name in ("evaluate", "choose", "perplexity"):
        monkeypatch.setattr(f"distilvlm.compare.questions.{name}", never)
    again = compare(comparison, out)
    assert {name: rows["one"].figures for name, rows in again.seeds[0].rows.items()} == {
        name: rows["one"].figures for name, rows in first.seeds[0].rows.items()
    }
    (tmp_path / "held-out.txt").write_text("another text")
    with pytest.raises(AssertionError, match="asked again"):
        compare(comparison, out)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("boxes", {"max_new_tokens": 16}, "max_new_tokens: 16 would cut a box: take 32 or more"),
        ("boxes", {"training": None}, "training: questions with 'measure: grounding' need it"),
        ("boxes", {"task": "piqa"}, "task: only questions with 'measure: choices' have any"),
        ("law", {"task": None}, "task: questions with 'measure: choices' need it"),
        ("law", {"stride": 4}, "stride: only questions with 'measure: perplexity' have any"),
        ("prose", {"path": None}, "path: questions with 'measure: perplexity' need it"),
        ("prose", {"images": "./pictures"}, "images: questions with 'measure: perplexity' are of text alone"),
    ],
)
def test_fields_that_do_not_fit_a_measure_are_refused(
    comparison: Path, tmp_path: Path, name: str, change: dict[str, Any], reason: str
) -> None:
    content = yaml.safe_load(comparison.read_text())
    content["questions"][name] |= change
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=reason):
        load_comparison(comparison, tmp_path)
