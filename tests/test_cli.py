"""The commands as a user types them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from distilvlm import cli
from tests.runs.tiny import write_recipe

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(autouse=True)
def keep_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["distilvlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_plan_of_the_published_run_needs_no_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "plan", RECIPES / "llava-kd.yaml", "--json", "--no-measure") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(s["name"], s["samples"], s["updates"], s["batch"], s["lr"]) for s in plan["stages"]] == [
        ("dpt", 558_128, 2181, 256, 1e-3),
        ("sft", 665_298, 5198, 128, 2e-5),
        ("dft", 665_298, 5198, 128, 2e-5),
    ]
    assert plan["student"]["visual_tokens"] == 728
    assert plan["stages"][0]["rows"]["visual"] == plan["stages"][0]["rows"]["relation"] == 728
    assert plan["stages"][0]["trains"] == [{"name": "projector", "parameters": 1152 * 896 + 896 + 896 * 896 + 896}]
    assert sum(part["parameters"] for part in plan["stages"][2]["trains"] if part["name"] == "language") == 494_032_768
    assert "llava-kd-teacher" in plan["teacher"]["missing"]


def test_plan_counts_rows_where_the_data_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "plan", write_recipe(tmp_path), "--json") == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages[0]["rows"] == {"text": 6.0, "response": 6.0, "visual": 4.0, "relation": 4.0}
    assert stages[0]["samples"] == 10
    assert stages[0]["updates"] == 6
    costs = [stage["cost"] for stage in stages]
    assert all(c["peak_memory_bytes"] == sum(c["memory"].values()) and c["seconds_per_update"] > 0 for c in costs)
    assert costs[2]["disk"]["finished student"] < costs[2]["disk_bytes"]


def test_a_wrong_key_is_one_line_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "plan", RECIPES / "llava-kd.yaml", "--set", "stages.0.optim.lrr=1") == 1
    error = capsys.readouterr().err
    assert "stages.dpt.optim.lrr" in error and "'lr'" in error and "Traceback" not in error


def test_a_wrong_part_in_the_last_stage_stops_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    arguments = ["--dir", tmp_path / "run", "--set", "stages.2.train=[projectr]"]
    assert command(monkeypatch, "run", recipe, *arguments) == 1
    assert "did you mean 'projector'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "stages").exists()


def test_run_then_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    # What changes the machine and not the objective, all at once.
    machine = ["machine.precision=bf16", "machine.gradient_checkpointing=true", "machine.trackers=[tensorboard]"]
    options = [word for field in machine for word in ("--set", field)]
    assert command(monkeypatch, "run", recipe, "--dir", tmp_path / "run", *options) == 0
    assert str(tmp_path / "run" / "model") in capsys.readouterr().out
    assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents*"))

    data = ["--data", tmp_path / "questions.json", "--images", tmp_path / "pictures"]
    out = tmp_path / "answers.jsonl"
    arguments = [*data, "--out", out, "--json", "--max-new-tokens", 4]
    assert command(monkeypatch, "evaluate", tmp_path / "run" / "model", *arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert summary["n"] == len(answers) == 13  # 10 rows, three of them with two turns
    assert summary["exact_match"]["mean"] == pytest.approx(sum(a["exact"] for a in answers) / len(answers))
