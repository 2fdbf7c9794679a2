"""Faults of the recipe itself, and of the machine: numbers, names, disk."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from distilvlm import cli
from distilvlm.doctor import Finding, disk, doctor, preparation, print_findings
from distilvlm.models.parts import parameters_of

from .conftest import Examine, material, only, said, write_model
from .test_models import TEXT_ONLY

Write = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("changes", "check", "level", "words"),
    [
        ({"stages.sft.optim.lr": 0.5}, "rate", "warning", ["trains at 0.5", "stages.sft.optim.lr"]),
        ({"stages.sft.optim.rates": {"projector": 1e-9}}, "rate", "warning", ["projector trains at 1e-09: too little"]),
        ({"stages.dpt.optim.rates": {"language": 1e-3}}, "rates", "error", ["language a rate", "remove its rate"]),
        ({"stages.dft.train": ["projectr"]}, "parts", "error", ["did you mean 'projector'?"]),
        ({"stages.dft.train": ["vision.unread"]}, "parts", "error", ["it cannot train"]),
        ({"machine.micro_batch": 8}, "micro_batch", "warning", ["machine.micro_batch=4"]),
        ({"stages.sft.optim.batch": 11}, "batch", "warning", ["optim.batch to 10"]),
        ({"stages.sft.optim.epochs": 0.1}, "updates", "warning", ["less than one update of 4", "optim.epochs"]),
        ({"stages.sft.optim.warmup": 0.9}, "warmup", "warning", ["all 6 updates are warm-up", "optim.warmup to 0"]),
        ({"pictures.features": "kept"}, "augment", "error", ["remove one of the two"]),
        (TEXT_ONLY, "unused", "warning", ["nothing is distilled", "teacher: null"]),
    ],
)
def test_settings(look: Examine, changes: dict[str, Any], check: str, level: str, words: list[str]) -> None:
    if check == "updates":  # the one update that there is would be warm-up, too
        changes = {**changes, "stages.sft.optim.warmup": 0.0}
    only(look(changes), f"settings.{check}", level, *words)


def test_the_only_update_is_warm_up(look: Examine) -> None:
    found = look({"stages.sft.optim.epochs": None, "stages.sft.optim.updates": 1})
    only(found, "settings.warmup", "warning", "the only update is warm-up, at a rate of 0")


def test_data_that_no_stage_uses_is_told(look: Examine) -> None:
    found = look({"stages.dpt.data": ["questions"]})
    assert [finding for finding in found if finding.level != "ok"] == []
    assert said(found, "settings.unused") == ["data 'captions' is used by no stage"]


def test_questions_in_the_plain_template(look: Examine, source: Write) -> None:
    rows = [(f"what colour is picture {number}", "red", ["0.png"]) for number in range(25)]
    changes = {"data.captions": source(rows, healthy=False)}
    assert not [finding for finding in look(changes) if finding.level != "ok"]  # only the projector trains on them
    found = look({**changes, "stages.dpt.train": ["projector", "language"]})
    only(found, "settings.plain", "warning", "25 different", "data.captions.template: chat")


def test_a_teacher_smaller_than_its_student(look: Examine, place: Path, tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "small", place / "tower", place / "tokenizer", 8, 1)
    only(
        look({"teacher.from": str(teacher)}),
        "settings.teacher",
        "warning",
        "smaller than the student's",
        "larger teacher",
    )


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_disk(look: Examine, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, student, _, data, _ = material(place)
    needed = disk.run_bytes(recipe, {name: student for name in data}, data)
    sizes = {
        name: sum(p.numel() for p in parameters_of(student.model, name).values()) for name in ("projector", "language")
    }
    projector, whole = sizes["projector"], sum(sizes.values())
    model = sum(parameter.numel() for parameter in student.model.parameters())
    # two checkpoints (behind updates 2 and 4 of 6) of weights and two moments, three finished stages, the model
    assert needed == 4 * (3 * 2 * whole + projector + 2 * whole + model)
    for free, level in ((needed - 1, "error"), (2 * needed - 1, "warning"), (2 * needed, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free, 0, free))
        if level == "ok":
            assert len(said(look(), "disk.space")) == 1
        else:
            only(look(), "disk.space", level, "free", "--dir", "machine.keep=1")


def test_kept_features_need_room_too(look: Examine, tmp_path: Path) -> None:
    changes = {"pictures.features": str(tmp_path / "kept"), "pictures.augment": None}
    text = said(look(changes), "disk.space")[0]
    assert str(tmp_path / "kept") in text


def test_a_wrong_recipe_is_one_finding(look: Examine, tmp_path: Path) -> None:
    only(look({"stages.dpt.optim.lrr": 1}), "recipe.fields", "error", "stages.dpt.optim.lrr", "'lr'")
    only(doctor(tmp_path / "nowhere.yaml"), "recipe.fields", "error", "no such recipe file")


def test_a_student_that_is_not_there(look: Examine, tmp_path: Path) -> None:
    found = look({"student.vision.from": str(tmp_path / "nowhere")})
    only(found, "student.weights", "error", "nowhere' is not here", "download")


def test_a_published_recipe_lacks_its_weights_and_data_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(preparation._Patient, "_student", offline)
    found = doctor(Path(__file__).parents[2] / "recipes" / "llava-kd.yaml")
    wanting = ["student.weights", "data.file", "data.file", "teacher.weights"]
    assert [finding.check for finding in found if finding.level != "ok"] == wanting
    assert said(found, "visual.tokens") == ["student: 384 px = 728 visual tokens (hidden state -2, select default)"]
    assert said(found, "parts.trains")[0].startswith("trains projector 1,836,800 float32")


def test_a_damaged_student(look: Examine, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "tower", tmp_path / "tower")
    (tmp_path / "tower" / "model.safetensors").write_bytes(b"broken")
    only(look({"student.vision.from": str(tmp_path / "tower")}), "student.weights", "error", "SafetensorError")


def test_the_command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    monkeypatch.setattr(logging.getLogger("distilvlm"), "level", logging.INFO)  # the command lowers it

    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["distilvlm", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    options = [place / "recipe.yaml", "--dir", tmp_path / "run"]
    assert command(*options) == 0
    assert "✗ 0 errors" in capsys.readouterr().out
    assert command(*options, "--json", "--set", "stages.dft.train=[projectr]") == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["check"] for finding in findings if finding["level"] == "error"] == ["settings.parts"]
    assert not (tmp_path / "run").exists()


def test_the_screen_fits_and_says_the_fix_below() -> None:
    long = "a word and another " * 12
    findings = [
        Finding("terms.rows", "error", f"visual: {long}", "set it to 0", "dft"),
        Finding("template.picture", "ok", "plain, row 1\n<image>×4⟦red↵⟧"),
        Finding("vocabulary.tokens", "warning", "first", "mend it"),
    ]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    print_findings(findings, console)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[:3] == ["vocabulary", "  ! first", "    → mend it"]
    assert lines[3:6] == ["template", "  ✓ plain, row 1", "      <image>×4⟦red↵⟧"]
    assert lines[-2:] == ["    → set it to 0", "✓ 1 ok, ! 1 warning, ✗ 1 error"]
