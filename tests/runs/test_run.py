"""A run refuses what it can't do before its first step, and loses nothing."""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import distilvlm
from distilvlm.data import DataError
from distilvlm.data import dataset as dataset_module
from distilvlm.data.geometry import decode
from distilvlm.models import forward
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.runs import execute
from distilvlm.runs.directory import RunDirectory, RunError
from distilvlm.runs.events import read_events
from distilvlm.runs.lock import locked
from distilvlm.teachers import TeacherError
from distilvlm.train import NonFiniteError

from .conftest import Server
from .tiny import VISION, language, write_recipe, write_tokenizer

ONE_STAGE = [
    {
        "name": "sft",
        "train": ["projector", "language"],
        "data": ["questions"],
        "optim": {"lr": 0.01, "batch": 4, "updates": 3},
    }
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, stages=ONE_STAGE)


def change(path: Path, **sections: object) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}, sort_keys=False))


def test_the_finished_student_is_a_stock_checkpoint(recipe: Path, tmp_path: Path) -> None:
    run = distilvlm.run(recipe, directory=tmp_path / "run")
    stock = AutoModelForImageTextToText.from_pretrained(run.model)
    trained = load_file(tmp_path / "run/stages/00-sft/final/weights.safetensors")
    found = dict(stock.named_parameters())
    for name, tensor in trained.items():
        rows = tensor.shape[0]  # the embedding has one more: <image>
        assert torch.equal(found[name][:rows], tensor), name


def test_another_recipe_is_refused_and_named(recipe: Path, tmp_path: Path) -> None:
    distilvlm.run(recipe, directory=tmp_path / "run")
    with pytest.raises(RunError, match=r"is a run of another recipe; these fields differ:\s+stages\.sft\.optim\.lr"):
        distilvlm.run(recipe, ["stages.0.optim.lr=0.02"], directory=tmp_path / "run")


def test_a_relative_path_may_bear_the_name_of_a_run_s_own_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").rename(tmp_path / "data")
    content = recipe.read_text().replace(str(tmp_path / "pictures"), "data")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "recipe.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    distilvlm.run("recipes/recipe.yaml", directory="run")
    assert (tmp_path / "run" / "data").is_dir()
    distilvlm.run("recipes/recipe.yaml", directory="run")


def test_the_machine_may_change_between_continuations(recipe: Path, tmp_path: Path) -> None:
    distilvlm.run(recipe, directory=tmp_path / "run")
    distilvlm.run(recipe, ["machine.micro_batch=4", "machine.workers=1"], directory=tmp_path / "run")


def test_a_directory_of_something_else_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match=r"home is not a run and not empty \(letter\.txt\): give another --dir"):
        distilvlm.run(recipe, directory=tmp_path / "home")
    assert [p.name for p in (tmp_path / "home").iterdir() if p.name != "lock"] == ["letter.txt"]


def test_processes_that_do_not_see_each_other_are_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate does of a torchrun on a machine without a GPU, if it is not told."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="2 processes were launched, but accelerate sees 1: they would all write into"):
        distilvlm.run(recipe, directory=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_a_second_process_is_refused(recipe: Path, tmp_path: Path, server: Server) -> None:
    with locked(tmp_path / "run"):
        statuses, _ = server.run(recipe, tmp_path / "run")
    assert statuses != [0]
    assert f"in use by process {os.getpid()}" in server.errors()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    distilvlm.run(recipe, ["machine.checkpoint_every=1"], directory=tmp_path / "whole")
    calls = []

    def stop_at_three(self: torch.optim.AdamW, *_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        step(self)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        distilvlm.run(recipe, ["machine.checkpoint_every=1"], directory=tmp_path / "run")
    monkeypatch.undo()
    newest = tmp_path / "run/stages/00-sft/checkpoints/00000002/weights.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    distilvlm.run(recipe, ["machine.checkpoint_every=1"], directory=tmp_path / "run")
    assert "is damaged" in caplog.text
    final = "stages/00-sft/final/weights.safetensors"
    assert (tmp_path / "run" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


def test_another_base_is_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilvlm.runs.stage.fingerprint", lambda *_: "another")
    interrupt_after_first_checkpoint(recipe, tmp_path / "run", monkeypatch)
    monkeypatch.undo()
    with pytest.raises(RunError, match="another base"):
        distilvlm.run(recipe, ["machine.checkpoint_every=1"], directory=tmp_path / "run")


def interrupt_after_first_checkpoint(recipe: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distilvlm.runs.checkpoint.rotate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distilvlm.run(recipe, ["machine.checkpoint_every=1"], directory=run)


def test_continuing_decodes_nothing_of_what_it_skips(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(recipe, stages=[{**ONE_STAGE[0], "optim": {"lr": 0.001, "batch": 1, "updates": 203}}])
    decoded: list[str] = []
    monkeypatch.setattr(dataset_module.geometry, "decode", lambda path: decoded.append(path) or decode(path))
    steps: list[int] = []
    step = torch.optim.AdamW.step

    def interrupted(self: torch.optim.AdamW, *_: object) -> None:
        if len(steps) == 201:
            raise KeyboardInterrupt
        steps.append(1)
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    overrides = ["machine.checkpoint_every=200", "machine.micro_batch=1"]
    with pytest.raises(KeyboardInterrupt):
        distilvlm.run(recipe, overrides, directory=tmp_path / "run")
    assert len(decoded) > 100
    decoded.clear()
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    distilvlm.run(recipe, overrides, directory=tmp_path / "run")
    assert len(decoded) <= 3
    numbers = [e["number"] for e in read_events(tmp_path / "run/events.jsonl") if e["event"] == "update"]
    assert numbers == list(range(1, 204))


def test_a_non_finite_term_stops_the_run_and_keeps_the_batch(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = forward.hidden_states
    calls: list[int] = []

    def poisoned(*arguments: object) -> torch.Tensor:
        calls.append(1)
        hidden = original(*arguments)  # type: ignore[arg-type]
        return hidden * float("nan") if len(calls) == 4 else hidden

    monkeypatch.setattr(forward, "hidden_states", poisoned)
    monkeypatch.setattr("distilvlm.runs.execute.consult", lambda *_: None)  # the doctor's own steps are not counted
    with pytest.raises(NonFiniteError, match=r"loss term text .* update 2"):
        distilvlm.run(recipe, directory=tmp_path / "run")
    (kept,) = (tmp_path / "run" / "trouble").iterdir()
    assert load_file(kept / "batch.safetensors")["input_ids"].shape[0] == 2
    assert [row["source"] for row in json.loads((kept / "report.json").read_text())["samples"]] == ["questions"] * 2
    done = [event for event in read_events(tmp_path / "run/events.jsonl") if event["event"] == "update"]
    assert len(done) == 1


@pytest.mark.usefixtures("estimates")
def test_a_run_keeps_what_it_was_expected_to_take_beside_what_it_took(recipe: Path, tmp_path: Path) -> None:
    distilvlm.run(recipe, directory=tmp_path / "run")
    (stage,) = json.loads((tmp_path / "run" / "cost.json").read_text())["stages"]
    assert stage["stage"] == "sft"
    expected, measured = stage["estimate"], stage["measured"]
    assert abs(expected["disk_bytes"] / measured["disk_bytes"] - 1) < 0.05
    assert abs(expected["peak_memory_bytes"] / measured["peak_memory_bytes"] - 1) < 0.5
    updates = [event["seconds"] for event in read_events(tmp_path / "run/events.jsonl") if event["event"] == "update"]
    assert measured["seconds_per_update"] == pytest.approx(statistics.median(updates[1:]))


def test_a_finished_stage_leaves_no_gradients_and_moments(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[object] = []
    original = execute._save

    def saved(recipe: Recipe, student: VLM, place: RunDirectory) -> None:
        left.extend(p.grad for p in student.model.parameters() if p.grad is not None)
        left.extend(one for one in gc.get_objects() if type(one) is torch.optim.AdamW and one.state)
        original(recipe, student, place)

    gc.collect()
    monkeypatch.setattr(execute, "_save", saved)
    distilvlm.run(recipe, directory=tmp_path / "run")
    assert left == []


def test_text_only_batches_do_not_run_the_tower(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.loads((tmp_path / "questions.json").read_text())
    (tmp_path / "questions.json").write_text(json.dumps([row for row in data if "image" not in row]))

    def must_not_run(*_: object) -> None:
        raise AssertionError("the vision tower ran")

    monkeypatch.setattr(forward, "vision_features", must_not_run)
    distilvlm.run(recipe, ["stages.sft.train=[language]"], tmp_path / "run")


def test_the_doctor_stops_a_run_in_which_a_part_can_not_learn(recipe: Path, tmp_path: Path) -> None:
    data = json.loads((tmp_path / "questions.json").read_text())
    (tmp_path / "questions.json").write_text(json.dumps([row for row in data if "image" not in row]))
    with pytest.raises(
        RunError, match=r"advises against this run:\s+stage 'sft': no loss term gives projector a(.|\n)*→ add rows"
    ):
        distilvlm.run(recipe, directory=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()
    distilvlm.run(recipe, ["stages.sft.train=[language]"], tmp_path / "other")
    found = json.loads((tmp_path / "other" / "doctor.json").read_text())["findings"]
    assert {finding["level"] for finding in found} <= {"ok", "warning"} and len(found) > 10


def test_a_run_says_what_made_it(recipe: Path, tmp_path: Path) -> None:
    distilvlm.run(recipe, directory=tmp_path / "run")
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    assert about["versions"]["torch"] == torch.__version__
    assert about["machine"]["cores"] >= 1 and about["machine"]["memory_bytes"] > 2**28
    assert about["processes"] == 1 and len(about["commands"]) == 1
    assert about["started"] <= about["finished"]
    stage = json.loads((tmp_path / "run" / "stages" / "00-sft" / "about.json").read_text())
    assert stage["trains"]["projector"] == {"parameters": 16 * 16 + 16 + 16 * 16 + 16, "dtype": "float32"}
    assert stage["data"]["questions"]["samples"] == 10
    distilvlm.run(recipe, directory=tmp_path / "run")  # nothing is left to do
    assert json.loads((tmp_path / "run" / "about.json").read_text()) == about


def test_a_missing_picture_stops_before_the_first_step(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "1.png").unlink()
    with pytest.raises(DataError, match=r"questions\.json, row 1, field 'image'.*1\.png"):
        distilvlm.run(recipe, directory=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_what_is_wrong_with_a_later_stage_s_data_stops_before_the_first(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    rows = json.loads((tmp_path / "questions.json").read_text())
    rows[2]["image"] = "nowhere.png"
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"questions\.json, row 2"):
        distilvlm.run(path, directory=tmp_path / "run")  # its first stage reads captions.json only
    assert not (tmp_path / "run" / "stages").exists()


def test_quarantined_rows_stay_out_although_they_were_mended(recipe: Path, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "1.png"
    content = picture.read_bytes()
    picture.unlink()
    distilvlm.run(recipe, ["machine.on_bad_row=quarantine"], directory=tmp_path / "run")
    picture.write_bytes(content)
    final = "stages/00-sft/final/weights.safetensors"
    expected = (tmp_path / "run" / final).read_bytes()
    shutil.rmtree(tmp_path / "run" / "stages")
    shutil.rmtree(tmp_path / "run" / "model")
    distilvlm.run(recipe, ["machine.on_bad_row=quarantine"], directory=tmp_path / "run")
    assert (tmp_path / "run" / final).read_bytes() == expected


def test_bad_rows_are_quarantined_by_name(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "1.png").unlink()
    whole = tmp_path / "pictures" / "2.png"
    Image.open(whole).save(tmp_path / "cut.png")
    whole.write_bytes((tmp_path / "cut.png").read_bytes()[:-60])  # its header is fine: found only when it is decoded
    distilvlm.run(recipe, ["machine.on_bad_row=quarantine", "stages.0.optim.updates=6"], directory=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == [1, 2]
    assert all(line["file"].endswith("questions.json") and line["field"] == "image" for line in lines)


def test_kept_features_train_as_online_ones(recipe: Path, tmp_path: Path) -> None:
    change(recipe, pictures={})
    distilvlm.run(recipe, directory=tmp_path / "online")
    distilvlm.run(recipe, [f"pictures.features={tmp_path / 'features'}"], directory=tmp_path / "kept")
    for a, b in zip(*(read_events(tmp_path / run / "events.jsonl") for run in ("online", "kept")), strict=True):
        if a["event"] == "update":
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    kd = {**ONE_STAGE[0], "loss": {"text": 1.0, "response": 1.0}}
    path = write_recipe(tmp_path, stages=[kd])
    other = tmp_path / "other"
    write_tokenizer(other, extra="cloud")
    recipe = yaml.safe_load(path.read_text())
    recipe["teacher"]["language"]["tokenizer"] = str(other)
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(TeacherError, match="different tokenizers"):
        distilvlm.run(path, directory=tmp_path / "run")


def test_a_teacher_that_sees_other_tokens_is_refused(tmp_path: Path) -> None:
    kd = {**ONE_STAGE[0], "loss": {"visual": 1.0}}
    teacher = {
        "vision": {"config": {**VISION, "patch_size": 4}},
        "language": {"config": language(24), "tokenizer": str(tmp_path / "tokenizer")},
    }
    path = write_recipe(tmp_path, stages=[kd], teacher=teacher)
    with pytest.raises(TeacherError, match=r"16 tokens .* 4 "):
        distilvlm.run(path, directory=tmp_path / "run")


def test_kept_features_are_refused_for_a_teacher_with_another_tower(tmp_path: Path) -> None:
    kd = {**ONE_STAGE[0], "name": "dft", "loss": {"visual": 1.0}}
    teacher = {
        "vision": {"config": {**VISION, "num_hidden_layers": 4}},
        "language": {"config": language(24), "tokenizer": str(tmp_path / "tokenizer")},
    }
    features = {"features": str(tmp_path / "features")}
    path = write_recipe(tmp_path, stages=[*ONE_STAGE, kd], teacher=teacher, pictures=features)
    with pytest.raises(TeacherError, match="has another one"):
        distilvlm.run(path, directory=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()  # although only the second stage needs a teacher


def test_reset_takes_parts_back_to_their_start(tmp_path: Path) -> None:
    still = {"lr": 0.01, "batch": 4, "updates": 1, "warmup": 0.5}  # the first update of a warm-up has rate 0
    path = write_recipe(
        tmp_path,
        stages=[
            {"name": "a", "train": ["language", "projector"], "data": ["questions"], "optim": ONE_STAGE[0]["optim"]},
            {
                "name": "b",
                "transform": [{"do": "reset", "parts": ["language"]}],
                "train": ["language", "projector"],
                "data": ["questions"],
                "optim": still,
            },
        ],
    )
    distilvlm.run(path, directory=tmp_path / "run")
    start = distilvlm.models.build(distilvlm.runs.execute.load_recipe(path).student, 7).model.named_parameters()
    first = load_file(tmp_path / "run/stages/00-a/final/weights.safetensors")
    second = load_file(tmp_path / "run/stages/01-b/final/weights.safetensors")
    for name, parameter in start:
        if name in second:
            expected = parameter if "language_model" in name else first[name]
            assert torch.equal(second[name], expected), name
            assert not torch.equal(second[name], first[name]) or "language_model" not in name
