"""Faults of data and templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distilvlm.data import IGNORED, Encoded
from distilvlm.doctor.template import draw
from tests.runs.tiny import CHATML

from .conftest import Examine, only, said
from .test_models import TEXT_ONLY, edited_tokenizer

LONG = "what colour is the sky " * 8
ALL_LEARNED = (
    "{% for message in messages %}{% generation %}{{ message['role'] + message['content'] }}<|im_end|>"
    "{% endgeneration %}{% endfor %}"
)

Write = Callable[..., dict[str, Any]]


def template_of(directory: Path, jinja: str) -> str:
    tokenizer = edited_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(jinja)
    return tokenizer


def test_everything_is_learned(look: Examine, tmp_path: Path) -> None:
    tokenizer = template_of(tmp_path / "tokenizer", ALL_LEARNED)
    found = look({"student.language.tokenizer": tokenizer})
    only(found, "template.mask", "error", "the questions too", "{% generation %}", "data.questions.template: vicuna")


def test_no_end_of_turn_is_learned(look: Examine, tmp_path: Path) -> None:
    tokenizer = template_of(tmp_path / "tokenizer", CHATML.replace("<|im_end|>", ""))
    found = look({"student.language.tokenizer": tokenizer})
    only(found, "template.end", "warning", "will not know when to stop", "data.questions.template: vicuna")


def test_registers_are_told_apart_and_long_texts_shortened() -> None:
    class Letters:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(map(chr, ids))

    text = [ord(letter) for letter in "ab\n" + 300 * "x"]
    labels = [ord("a"), IGNORED, IGNORED] + [IGNORED] * 300
    encoded = Encoded(torch.tensor([0] * 6 + text), torch.tensor([IGNORED] * 6 + labels), torch.arange(6))
    drawn = draw(encoded, torch.tensor([False, True, True]), Letters())
    pictures = "<register>×1<image>×2<register>×1<image>×2"
    assert drawn == f"{pictures}⟦a⟧b↵\n{'x' * 118} … {'x' * 120}"


@pytest.mark.parametrize("policy", ["fatal", "quarantine"])
def test_rows_without_anything_to_learn(look: Examine, source: Write, policy: str) -> None:
    changes = {
        "data.questions": source([(LONG, "blue", [])]),
        "machine.on_bad_row": policy,
        "stages.sft.max_length": 60,
    }
    found = look(changes)
    level = "error" if policy == "fatal" else "warning"
    told = only(found, "rows.empty", level, "1 of 11 rows have nothing to learn", "row 10", "max_length (now 60)")
    assert [finding.stage for finding in told] == ["sft"]


def test_pictures_that_the_context_cuts(look: Examine, source: Write) -> None:
    pictures = [f"{row}.png" for row in range(10)] * 2
    found = look({"data.questions": source([("what is this", "a picture", pictures)]), "stages.dft.max_length": 60})
    only(found, "rows.pictures", "error", "20 x 4 visual tokens", "raise stages.dft.max_length")


def test_rows_that_can_not_be_used(look: Examine, source: Write) -> None:
    found = look({"data.questions": source([("what is this", "a picture", ["nowhere.png"])])})
    only(found, "rows.unusable", "error", "nowhere.png", "machine.on_bad_row=quarantine")


def test_rows_that_lose_their_end(look: Examine, source: Write) -> None:
    found = look({"data.questions": source([("what is this", LONG, [])]), "stages.sft.max_length": 60})
    only(found, "rows.cut", "warning", "9% of the rows lose their end", "raise stages.sft.max_length")
    assert "1 cut at the end" in said(found, "rows.count")[1]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_rows_longer_than_the_context(look: Examine, source: Write, role: str) -> None:
    changes: dict[str, Any] = {"data.questions": source([("what is this", 3 * LONG, [])])}
    if role == "student":
        changes |= {"teacher": None, **TEXT_ONLY}
    else:
        changes |= {"student.language.config.max_position_embeddings": 512}
    found = look(changes)
    only(found, "rows.context", "warning", f"the {role}'s context is 128", "max_length to 128")


def test_typed_image_tokens_are_counted(look: Examine, source: Write) -> None:
    found = look({"data.questions": source([("what is <image> this", "blue", [])])})
    assert [finding for finding in found if finding.level != "ok"] == []
    assert "1 typed image tokens made harmless" in said(found, "rows.count")[1]


def test_weights_count_in_an_epoch(look: Examine) -> None:
    found = look({"data.captions.weight": 0.3})
    only(found, "settings.batch", "warning", "more than the 3 samples of an epoch", "stages.dpt.optim.batch to 3")
    assert said(found, "rows.count")[0].startswith("captions 10 rows × 0.3 per epoch")


def test_no_such_file(look: Examine) -> None:
    found = look({"data.captions.path": "nowhere.json"})
    only(found, "data.file", "error", "nowhere.json", "data.captions")
    assert [finding.stage for finding in found if finding.check == "terms.text"] == ["sft", "dft"]


def test_no_row_of_a_file_can_be_used(look: Examine, source: Write) -> None:
    section = source([("what is this", "a picture", ["0.png"])], healthy=False)
    found = look({"data.captions": {**section, "images": "/nowhere"}})
    only(found, "data.rows", "error", "no usable row", "set data.captions.images; the first:", "0.png")


def test_a_tokenizer_without_a_chat_template(look: Examine, place: Path, tmp_path: Path) -> None:
    tokenizer = template_of(tmp_path / "tokenizer", "")
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    found = look({"student.language.tokenizer": tokenizer})
    only(found, "data.rows", "error", "no chat template; set template: vicuna", "data.questions")
