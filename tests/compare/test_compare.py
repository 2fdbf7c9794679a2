"""A comparison: its runs find each other, its students are asked the same, what is finished is not done again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from distilvlm.compare import compare, execute, load_comparison
from distilvlm.data import DataError
from distilvlm.evaluate import difference, rescored
from distilvlm.recipe import RecipeError, load_recipe
from distilvlm.runs.lock import InUseError, locked
from tests.runs.tiny import write_recipe


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """Teacher (made once), control and distilled student of tiny models; two question sets on the training pictures."""
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    stage = {"name": "sft", "train": ["projector", "language"], "data": ["questions"]}
    stage["optim"] = {"lr": 0.01, "batch": 4, "updates": 2}
    plain = {key: value for key, value in recipe.items() if key not in ("teacher", "stages")} | {"stages": [stage]}
    distilled = plain | {"teacher": {"from": "${TEACHER}"}, "stages": [stage | {"loss": {"text": 1, "response": 1}}]}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain))
    (tmp_path / "distilled.yaml").write_text(yaml.safe_dump(distilled))
    asked = {"title": "Colours", "images": "./pictures", "max_new_tokens": 2, "batch": 8}
    content = {
        "name": "tiny",
        "title": "Tiny",
        "runs": [
            {"name": "teacher", "recipe": "plain.yaml", "set": {"stages.sft.optim.updates": 3}, "once": True},
            {"name": "control", "recipe": "plain.yaml"},
            {"name": "distilled", "recipe": "distilled.yaml"},
        ],
        "questions": {
            "colours": {**asked, "path": "./questions.json", "training": "./questions.json"},
            "captions": {**asked, "path": "./captions.json", "training": "./captions.json", "measure": "exact"},
        },
        "differences": [["teacher", "control"], ["distilled", "question-only"]],
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def changed(file: Path, **changes: Any) -> Path:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
    return file


def test_every_seed_is_made_asked_and_written_down(comparison: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = compare(comparison, out, seeds=2)
    content = json.loads((out / "comparison.json").read_text())
    assert [seed["seed"] for seed in content["seeds"]] == [0, 1]
    assert content["seeds"][1]["runs"] == {
        "teacher": "seed-0/teacher",  # made once, used for both
        "control": "seed-1/control",
        "distilled": "seed-1/distilled",
    }
    assert not (out / "seed-1" / "teacher").exists()
    assert load_recipe(out / "seed-1" / "control" / "recipe.yaml").seed == 1
    assert load_recipe(out / "seed-1" / "distilled" / "recipe.yaml").teacher.source == str(out / "seed-0/teacher/model")
    assert list(content["seeds"][0]["rows"]["colours"]) == [
        "majority", "question-only", "teacher", "control", "distilled",
    ]  # fmt: skip
    files = [out / "seed-1" / "answers" / "colours" / f"{name}.jsonl" for name in ("teacher", "control")]
    gap = difference(*(rescored(file, by_picture=True) for file in files))
    assert content["seeds"][1]["differences"]["colours"]["teacher - control"] == vars(gap)
    assert content["questions"]["captions"] == {"title": "Colours", "measure": "exact", "n": 10, "pictures": 10}
    assert content["models"]["teacher"]["parameters"] > content["models"]["teacher"]["language_model_parameters"] > 0
    assert "Colours" in (out / "report.html").read_text()
    table = (out / "table.md").read_text()
    assert "| distilled − question-only |  |" in table and "seed 1" in table
    assert results.seeds[1].rows["colours"]["majority"].exact_match.mean > 0


def test_the_same_call_asks_and_trains_nothing_again(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = compare(comparison, out)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("distilvlm.compare.questions.evaluate", never)
    again = compare(comparison, out)
    assert again.seeds[0].rows == first.seeds[0].rows
    changed(
        comparison,
        questions={"colours": yaml.safe_load(comparison.read_text())["questions"]["colours"] | {"max_new_tokens": 1}},
    )
    with pytest.raises(AssertionError, match="asked again"):
        compare(comparison, out)


def test_two_processes_do_not_work_in_one_directory(comparison: Path, tmp_path: Path) -> None:
    out, (ready, began), (end, done) = tmp_path / "out", os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # a lock is a process's own
        with locked(out):
            os.write(began, b".")
            os.read(end, 1)
            os._exit(0)
    os.read(ready, 1)
    with pytest.raises(InUseError, match=f"out is in use by process {child} on"):
        compare(comparison, out)
    assert [file.name for file in out.iterdir()] == ["lock"]
    os.write(done, b".")
    os.waitpid(child, 0)
    with locked(out):  # which is free again
        pass


def test_features_are_kept_with_the_tower_of_a_student_that_an_earlier_run_made(
    comparison: Path, tmp_path: Path
) -> None:
    recipe = yaml.safe_load((tmp_path / "plain.yaml").read_text())
    later = recipe | {"student": {"from": "${BASE}"}, "pictures": {"features": "${COMPARISON}/features"}}
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(later))
    base = {"name": "base", "recipe": "plain.yaml", "asked": False, "once": True}  # its tower is drawn by its seed
    runs = [base, {"name": "later", "recipe": "later.yaml"}]
    results = compare(changed(comparison, runs=runs, differences=[]), tmp_path / "out", seeds=2)
    assert len(results.seeds) == 2
    kept = json.loads((tmp_path / "out" / "features" / "index.json").read_text())
    assert sum(len(shard) for shard in kept["shards"]) == 10  # every picture once, also those that are only asked about


def test_a_fault_in_the_last_recipe_is_told_before_the_first_run(comparison: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "distilled.yaml"
    recipe.write_text(recipe.read_text().replace("response", "respone"))
    with pytest.raises(RecipeError, match="did you mean 'response'"):
        compare(comparison, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_answers_whose_pictures_are_not_there_are_refused_and_not_left_out(
    comparison: Path, tmp_path: Path
) -> None:
    (tmp_path / "nowhere").mkdir()
    questions = yaml.safe_load(comparison.read_text())["questions"]["colours"] | {"training_images": "./nowhere"}
    with pytest.raises(DataError, match=r"questions\.json, row 0, field 'image'.*nowhere"):
        compare(changed(comparison, questions={"colours": questions}), tmp_path / "out")
    assert not (tmp_path / "out" / "seed-0").exists()  # before the first run


def test_a_difference_with_something_that_is_not_asked_is_refused(comparison: Path, tmp_path: Path) -> None:
    changed(comparison, differences=[["distilled", "contrl"]])
    with pytest.raises(
        RecipeError, match="nothing named 'contrl' is asked: there are majority, question-only, teacher"
    ):
        load_comparison(comparison, tmp_path)
    changed(comparison, differences=[], trends=[{"over": "size", "runs": {1: "control", 2: "distiled"}}])
    with pytest.raises(RecipeError, match="trends: nothing named 'distiled' is asked"):
        load_comparison(comparison, tmp_path)


def test_an_unknown_key_is_refused_with_the_nearest(comparison: Path, tmp_path: Path) -> None:
    changed(comparison, question={})
    with pytest.raises(RecipeError, match=r"tiny\.yaml: question: unknown key; did you mean 'questions'"):
        load_comparison(comparison, tmp_path)


def test_data_is_converted_once_and_again_when_its_source_or_options_change(tmp_path: Path) -> None:
    source = tmp_path / "classes"
    for label in ("hat", "shoe"):
        (source / label).mkdir(parents=True)
        Image.new("RGB", (8, 8), (len(label), 0, 0)).save(source / label / "0.png")
    spec = execute.Comparison.model_validate(
        {
            "name": "x",
            "title": "x",
            "runs": [{"name": "a", "recipe": "a.yaml"}],
            "questions": {"q": {"title": "q", "path": "q", "training": "q"}},
            "prepare": {"data": {"c": {"format": "folders", "from": str(source), "options": {"question": "What?"}}}},
        }
    ).prepare.data["c"]
    out = tmp_path / "data"
    execute.converted("c", spec, out)
    rows = [json.loads(line) for line in (out / "c.jsonl").read_text().splitlines()]
    assert [row["conversations"][1]["value"] for row in rows] == ["hat", "shoe"]
    written = (out / "c.jsonl").stat().st_mtime_ns
    execute.converted("c", spec, out)
    assert (out / "c.jsonl").stat().st_mtime_ns == written
    execute.converted("c", spec.model_copy(update={"options": {"question": "Which?"}}), out)
    assert "Which?" in (out / "c.jsonl").read_text()
    Image.new("RGB", (8, 8)).save(source / "hat" / "1.png")
    execute.converted("c", spec, out)
    assert len((out / "c.jsonl").read_text().splitlines()) == 3


def test_the_comparison_on_photographs_finds_its_recipes_and_differs_in_losses_only(tmp_path: Path) -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    comparison = load_comparison(recipes / "photos.yaml", tmp_path)
    control, distilled = (load_recipe(run.recipe) for run in comparison.runs if run.name != "teacher")
    kept = {"name", "loss"}
    assert [one.model_dump(exclude=kept) for one in control.stages] == [
        one.model_dump(exclude=kept) for one in distilled.stages
    ]
    assert control.student == distilled.student and control.data == distilled.data
    assert [stage.loss.needs_teacher for stage in distilled.stages] == [True, False, True]
