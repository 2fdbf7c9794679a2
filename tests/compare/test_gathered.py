"""Models that are there already, compared on what each was asked: whose answers are whose, what is shared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from distilvlm.compare import gather, speed
from distilvlm.data import DataError, Record, SampleKey, Turn
from distilvlm.evaluate import difference, gap_closed, score
from distilvlm.evaluate.questions import Question
from distilvlm.runs.execute import run
from tests.runs.tiny import write_recipe

RIGHT = {"teacher": range(0, 36), "control": range(0, 12), "student": range(0, 24)}
"""Which of 40 questions each has right."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates, and one that continues its student."""
    directory = tmp_path_factory.mktemp("gathered")
    recipe = yaml.safe_load(write_recipe(directory).read_text())
    stage = {"name": "sft", "train": ["projector"], "data": ["questions"]}
    stage["optim"] = {"lr": 0.01, "batch": 4, "updates": 2}
    plain = {key: value for key, value in recipe.items() if key not in ("teacher", "stages")} | {"stages": [stage]}
    (directory / "plain.yaml").write_text(yaml.safe_dump(plain))
    run(directory / "plain.yaml", directory=directory / "first")
    later = plain | {"student": {"from": str(directory / "first" / "model")}}
    (directory / "later.yaml").write_text(yaml.safe_dump(later))
    run(directory / "later.yaml", directory=directory / "second")
    return directory


def answers(file: Path, who: str, prompt: str = "short", count: int = 40, where: str = "test.json") -> Path:
    """As `evaluate --suite --out` writes them: 40 questions on 20 pictures."""
    asked = []
    for row in range(count):
        turns = (Turn("user", f"question {row}?"), Turn("assistant", "red"))
        record = Record(SampleKey("test", where, row), str(row), (f"{where}-{row // 2}.png",), turns)
        asked.append(Question(record, 0))
    given = ["red" if row in RIGHT[who] else "blue" for row in range(count)]
    score(asked, given, by_picture=True).write(file)
    about = {"suite": "gqa", "split": "testdev_balanced", "measure": "accurate", "prompt": prompt}
    file.with_suffix(".json").write_text(json.dumps({"asked": about}))
    return file


@pytest.fixture
def given(finished: Path, tmp_path: Path) -> dict[str, Path]:
    """A run, a model's directory and a file of answers alone; the student was asked on another machine."""
    for name in ("first", "second"):
        shutil.copytree(finished / name, tmp_path / name)
    student, control = tmp_path / "second", tmp_path / "control"
    shutil.copytree(finished / "first" / "model", control)
    answers(student / "answers" / "gqa.jsonl", "student", where="/elsewhere/test.json")
    answers(control / "answers" / "gqa.jsonl", "control", count=38)
    return {
        "student": student,
        "control": control,
        "teacher": answers(tmp_path / "teacher" / "big.jsonl", "teacher"),
    }


def content(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "comparison.json").read_text())


def test_runs_models_and_files_of_answers_stand_side_by_side(given: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = gather([f"student={given['student']}", str(given["control"]), str(given["teacher"])], out)
    told = content(out)
    assert list(told["models"]) == ["student", "control", "teacher"]
    assert told["roles"] == {"teacher": "teacher", "control": "control"}
    rows = results.seeds[0].rows["gqa-testdev_balanced"]
    # The control was asked two questions less, which nobody had right.
    assert [rows[name].n for name in told["models"]] == [38, 38, 38]
    assert [rows[name].accuracy.mean for name in told["models"]] == pytest.approx([24 / 38, 12 / 38, 36 / 38])
    seed = told["seeds"][0]
    questions = "gqa-testdev_balanced"
    assert seed["differences"][questions] == {
        f"{name} - control": vars(difference(rows[name], rows["control"])) for name in ("student", "teacher")
    }
    closed = seed["closed"][questions]
    assert closed == {"student": vars(gap_closed(rows["student"], rows["control"], rows["teacher"]))}
    assert closed["student"]["mean"] == pytest.approx(0.5)
    assert told["questions"][questions]["title"] == "GQA"
    page = (out / "report.html").read_text()
    assert "38 questions about 19 pictures" in page and "student right, control wrong" in page
    assert "seed 0" not in page  # models from anywhere have no seeds
    assert (out / "table.md").read_text().count("| student: of the gap control → teacher, % |") == 1


def test_what_a_model_is_and_cost_is_told_where_it_is_known(given: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    gather([f"student={given['student']}", str(given["control"]), str(given["teacher"])], out)
    models = content(out)["models"]
    first, second = (
        [json.loads(line)["seconds"] for line in (tmp_path / name / "events.jsonl").read_text().splitlines()
         if '"update"' in line]
        for name in ("first", "second")
    )  # fmt: skip
    assert models["student"]["training_seconds"] == pytest.approx(sum(second) + sum(first))  # it goes on with the first
    assert models["control"]["training_seconds"] is None  # a directory does not tell
    assert models["control"]["parameters"] == models["student"]["parameters"] > 0
    assert models["control"]["active_parameters"] == models["control"]["parameters"]
    assert models["student"]["disk_bytes"] == sum(f.stat().st_size for f in (given["student"] / "model").iterdir())
    assert set(models["teacher"].values()) == {None}


def test_speed_is_measured_once_for_the_same_weights(
    given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "TOKENS", 2)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    words, out = [f"control={given['control']}"], tmp_path / "out"
    gather(words, out)
    assert content(out)["models"]["control"]["answering"] is None
    gather(words, out, measure=True)
    measured = content(out)["models"]["control"]["answering"]
    assert measured["tokens_per_second"] > 0 and measured["together_per_second"] > measured["tokens_per_second"]
    assert measured["tokens"] == 2 and measured["precision"] == "fp32"

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(speed, "measured", never)
    gather(words, out)  # also without asking for it: it is known
    assert content(out)["models"]["control"]["answering"] == measured
    manifest = given["control"] / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")  # other weights
    with pytest.raises(AssertionError, match="measured again"):
        gather(words, out, measure=True)


def test_what_cannot_be_compared_is_refused_by_name(given: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [str(given["control"]), str(given["teacher"])]
    with pytest.raises(DataError, match=r"--teacher: nothing here is called 'techer'.*teacher"):
        gather(both, out, teacher="techer")
    with pytest.raises(DataError, match="no such file or directory"):
        gather([str(tmp_path / "nowhere")], out)
    with pytest.raises(DataError, match="two models are called 'control'"):
        gather([both[0], f"control={given['student']}"], out)
    with pytest.raises(DataError, match=r"both answer gqa-testdev_balanced"):
        gather([both[0], f"control={given['teacher']}"], out)
    with pytest.raises(DataError, match=r"nothing was asked of first: .*distilvlm evaluate"):
        gather([str(tmp_path / "first")], out)
    (tmp_path / "first" / "model" / "config.json").unlink()
    (tmp_path / "first" / "model" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"first: the run is not finished: no config\.json and no manifest\.json in"):
        gather([str(tmp_path / "first")], out)
    answers(given["teacher"], "teacher", prompt="long")
    with pytest.raises(DataError, match="prompt is 'short' in one, 'long' in the other"):
        gather(both, out)
    assert not (out / "comparison.json").exists()
