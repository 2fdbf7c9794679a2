"""Faults of student and teacher: vocabulary, visual tokens, parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.runs.tiny import VISION, language, write_tokenizer

from .conftest import Examine, examined, material, only, said, write_model, write_tower

TERMS = ("response", "visual", "relation")
TEXT_ONLY = {f"stages.{stage}.loss.{term}": 0 for stage in ("dpt", "dft") for term in TERMS}
ALONE = {"vision": None, "language": None}


def edited_tokenizer(directory: Path, **changes: Any) -> str:
    write_tokenizer(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(directory)


def test_another_tokenizer(look: Examine, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "other", "aardvark")
    found = look({"student.language.tokenizer": str(tmp_path / "other")})
    only(
        found,
        "vocabulary.tokens",
        "error",
        "ids mean another token",
        "'",
        "response, visual and relation to 0 in dpt, dft",
    )


def test_another_tokenizer_harms_no_run_that_compares_nothing(look: Examine, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "other", "aardvark")
    found = look({"student.language.tokenizer": str(tmp_path / "other"), "teacher": None, **TEXT_ONLY})
    assert [finding for finding in found if finding.level != "ok"] == []


def test_no_end_of_text(look: Examine, tmp_path: Path) -> None:
    tokenizer = edited_tokenizer(
        tmp_path / "other", eos_token=None, extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    only(look({"student.language.tokenizer": tokenizer}), "vocabulary.special", "warning", "set eos_token")


def test_another_number_of_visual_tokens(look: Examine) -> None:
    found = look({"student.vision.select": "full"})
    only(found, "visual.tokens", "error", "4 visual tokens + 1 CLS", "select ('default')", "dpt, dft")


def test_kept_features_and_a_teacher_with_another_tower(look: Examine, tmp_path: Path) -> None:
    tower = write_tower(tmp_path / "tower", seed=1)
    changes = {"student.vision.from": str(tower), "pictures.features": str(tmp_path / "kept"), "pictures.augment": None}
    only(look(changes), "visual.features", "error", "remove pictures.features")


def test_kept_features_serve_a_teacher_that_holds_the_same_tower_in_bf16(look: Examine, tmp_path: Path) -> None:
    changes = {"teacher.precision": "bf16", "pictures.features": str(tmp_path / "kept"), "pictures.augment": None}
    assert [finding for finding in look(changes) if finding.level == "error"] == []


def test_weights_in_bf16_that_train_are_refused(place: Path) -> None:
    found = examined(*material(place, dtype=torch.bfloat16))
    told = only(found, "parts.master", "error", "projector in bfloat16 and language in bfloat16", "float32")
    assert [finding.stage for finding in told] == ["dpt", "sft", "dft"]


def test_a_frozen_part_may_be_bf16(place: Path) -> None:
    recipe, student, *rest = material(place)
    student.model.model.vision_tower.to(torch.bfloat16)
    found = examined(recipe, student, *rest)
    assert [finding for finding in found if finding.level != "ok"] == []
    assert "bfloat16" in said(found, "parts.trains")[0]


def test_a_random_language_model_that_never_trains(look: Examine) -> None:
    found = look({"stages.sft.train": ["projector"], "stages.dft.train": ["projector"]})
    only(found, "parts.random", "warning", "language is randomly initialised", "add 'language' to the train list")


def test_a_random_rest_of_the_language_model(look: Examine) -> None:
    train = ["projector", "language.embedding", "language.attention", "language.norm"]
    found = look({"stages.sft.train": train, "stages.dft.train": train})
    only(found, "parts.random", "warning", "language.feed_forward is randomly initialised")


def test_a_random_vision_tower(look: Examine) -> None:
    found = look({"student.vision": {"from": None, "config": VISION}})
    only(found, "parts.random", "warning", "vision is randomly initialised", "student.vision.from")


def test_a_projector_that_no_run_before_has_trained(look: Examine, place: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", place / "tower", place / "tokenizer", 16, 2, trained=False)
    train = {f"stages.{stage}.train": ["language"] for stage in ("dpt", "sft", "dft")}
    found = look({"student": {"from": str(model), **ALONE}, **train})
    only(found, "parts.random", "warning", "projector is randomly initialised", "add 'projector'", "student.from")
    trained = write_model(tmp_path / "trained", place / "tower", place / "tokenizer", 16, 2)
    assert said(look({"student": {"from": str(trained), **ALONE}, **train}), "parts.random") == []


def test_a_teacher_that_never_trained(look: Examine, place: Path) -> None:
    parts = {"config": language(24, layers=3), "tokenizer": str(place / "tokenizer")}
    found = look({"teacher": {"from": None, "vision": {"from": str(place / "tower")}, "language": parts}})
    only(
        found,
        "parts.teacher",
        "warning",
        "projector and language are randomly initialised",
        "teacher: {from: RUN/model}",
    )


def test_what_lies_behind_the_layer_that_is_read_is_told(look: Examine) -> None:
    found = look({"stages.sft.train": ["projector", "language", "vision"]})
    assert [finding for finding in found if finding.level != "ok"] == []
    assert len(said(found, "parts.unread")) == 1
