"""A comparison of encoders: measured by neighbours, a probe and teachers' features, beside a model in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from distilvlm.cli import app
from distilvlm.compare import compare, load_comparison
from distilvlm.evaluate.encoders import subjects
from distilvlm.recipe import RecipeError
from distilvlm.report.read import Comparison, read
from tests.runs.tiny import write_recipe
from tests.runs.tiny_move import write_alone

PICTURES = 20


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """Two encoders alone, of which one stays as it is, and a language model on the other; all of one update a stage."""
    kept = {"path": str(tmp_path / "kept")}
    alone = yaml.safe_load(write_alone(tmp_path, PICTURES, cache=kept, pictures=None).read_text())
    for stage in alone["stages"]:
        stage["optim"] = {"lr": 0.001, "batch": 4, "updates": 2}
    (tmp_path / "distilled.yaml").write_text(yaml.safe_dump(alone))
    frozen = {**alone["stages"][0], "transform": [], "train": ["adapters"], "loss": {"text": 0.0, "encoder": 1.0}}
    frozen["encoder"] = {"token_weights": "none", "teacher_weights": "none"}
    (tmp_path / "frozen.yaml").write_text(yaml.safe_dump({**alone, "stages": [frozen]}))
    words = yaml.safe_load(write_recipe(tmp_path / "words", PICTURES).read_text())
    words["student"]["vision"] = {"from": "${DISTILLED}"}
    stage = {"name": "sft", "train": ["projector"], "data": ["questions"], "loss": {"text": 1.0}}
    stage["optim"] = {"lr": 0.01, "batch": 4, "updates": 1}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump({**words, "teacher": None, "stages": [stage]}))
    labels = {"path": "./labels.json", "images": "./pictures", "training": "./labels.json"}
    rows = [row for row in json.loads((tmp_path / "questions.json").read_text()) if "image" in row]
    for row in rows:
        row["conversations"] = row["conversations"][:2]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    content = {
        "name": "tiny",
        "title": "Tiny",
        "runs": [{"name": name, "recipe": f"{name}.yaml"} for name in ("frozen", "distilled", "words")],
        "questions": {
            "neighbours": {**labels, "title": "Neighbours", "measure": "knn", "neighbours": 3},
            "probe": {**labels, "title": "Probe", "measure": "probe", "pooling": "both"},
            "features": {**labels, "title": "Features", "measure": "feature_error", "teachers": ["cnn", "siglip"]},
            "words": {**labels, "title": "Words", "max_new_tokens": 3, "batch": 8},
        },
        "differences": [["distilled", "frozen"], ["distilled", "predict-the-mean"], ["words", "majority"]],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "tiny.yaml"


def changed(file: Path, questions: str, **changes: Any) -> Path:
    content = yaml.safe_load(file.read_text())
    content["questions"][questions].update(changes)
    file.write_text(yaml.safe_dump(content))
    return file


def test_encoders_are_measured_and_models_asked(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    results = compare(comparison, out)
    rows = results.seeds[0].rows
    assert list(rows["neighbours"]) == list(rows["probe"]) == ["majority", "frozen", "distilled"]
    assert list(rows["features"]) == ["predict-the-mean", "frozen", "distilled"]
    assert list(rows["words"]) == ["majority", "question-only", "words"]
    features = rows["features"]["distilled"]
    assert list(features.categories) == ["cnn", "siglip"] and features.n == 2 * rows["probe"]["frozen"].n
    assert features.figures["feature_error"].mean == pytest.approx(1 - features.figures["explained"].mean)
    assert rows["features"]["predict-the-mean"].main.mean == 1

    table = (out / "table.md").read_text()
    count = results.facts["distilled"].parameters
    assert "| probe, 15 questions on 15 pictures, linear probe accuracy in % | encoder | seed 0 |" in table
    assert f"| distilled | {count:,} |" in table and count > results.facts["frozen"].parameters
    assert table.count("| distilled − frozen |") == 3 and table.count("| distilled − predict-the-mean |") == 1
    assert "feature error relative to the mean's in % (lower is better)" in table

    again = [file.stat().st_mtime_ns for file in sorted(out.rglob("*.asked.json"))]
    monkeypatch.setattr("distilvlm.compare.ask.EncoderAnswers", None)  # nothing is asked twice
    same = compare(comparison, out)
    assert again == [file.stat().st_mtime_ns for file in sorted(out.rglob("*.asked.json"))]
    assert same.seeds[0].rows["features"]["distilled"].figures == features.figures

    read_back = read(out)
    assert isinstance(read_back, Comparison)
    page = (out / "report.html").read_text()
    for said in ("never looks at the picture", "mean&#39;s, siglip", "how far from the features of cnn?"):
        assert said in page
    assert "No answers of" not in page  # who is not asked is not missing

    looked = json.loads((out / "seed-0" / "distilled" / "importance.json").read_text())["maps"][0]
    assert [Path(one["picture"]).stem for one in looked["pictures"]] == ["0", "11", "14", "18", "3", "6"]
    assert looked["used_by"][1] == "stage all: a patch counts by an even share plus its own share here"

    run = str(out / "seed-0" / "distilled")
    stock = subjects([run, str(out / "seed-0" / "frozen" / "model")], geometry="pad")  # is read as the run is, else
    assert [one.encoder.size for one in stock.values()] == [16, 16]
    assert [one.geometry for one in stock.values()] == ["square", "pad"]
    labels = f"--train {tmp_path}/labels.json --test {tmp_path}/labels.json --images {tmp_path}/pictures"
    command = f"encoder {run} {labels} --neighbours 3"
    told = CliRunner().invoke(
        app,
        [*command.split(), "--against", str(out / "seed-0" / "frozen"), "--json", "--out", str(tmp_path / "lines")],
        catch_exceptions=False,
    )
    found = json.loads(told.stdout)
    assert found["knn"]["rows"]["distilled"] == rows["neighbours"]["distilled"].summary()
    assert found["feature_error"]["rows"]["distilled"] == features.summary()
    assert found["knn"]["difference"] == vars(results.gap(results.seeds[0], "neighbours", ("distilled", "frozen")))
    assert sorted(file.name for file in (tmp_path / "lines").iterdir())[:2] == [
        "feature_error-distilled.jsonl",
        "feature_error-frozen.jsonl",
    ]


def test_sets_that_nobody_answers_are_named_before_anything_is_made(comparison: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(comparison.read_text())
    for names, message in (
        (("words",), r"questions.features \(feature_error\) are for a vision encoder alone, and no run"),
        (("frozen", "distilled"), r"questions.words \(accurate\) are for a model with a language model"),
    ):
        runs = [{**run, "asked": run["name"] in names} for run in content["runs"]]
        comparison.write_text(yaml.safe_dump({**content, "runs": runs, "differences": []}))
        with pytest.raises(RecipeError, match=message):
            compare(comparison, tmp_path / "out")
    only = {"words": content["questions"]["words"]}
    comparison.write_text(yaml.safe_dump({**content, "questions": only, "differences": []}))
    with pytest.raises(RecipeError, match="run 'frozen': no questions are for such a student"):
        compare(comparison, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("questions", "changes", "message"),
    [
        ("words", {"take": 3}, "take: only questions with 'measure: knn | probe | feature_error | feature_readout'"),
        ("probe", {"neighbours": 3}, "neighbours: only questions with 'measure: knn' have any"),
        ("features", {"teachers": None}, "teachers: questions with 'measure: feature_error' need it"),
        ("features", {"pooling": "cls"}, "pooling: only questions with 'measure: knn | probe' have any"),
    ],
)
def test_fields_of_other_measures_are_refused(
    comparison: Path, tmp_path: Path, questions: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        load_comparison(changed(comparison, questions, **changes), tmp_path / "out")
    assert message in str(error.value)
