"""A teacher of other tokens or of another grid: its rows, brought to the student's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distilvlm.data import StageData
from distilvlm.data.collate import collate
from distilvlm.data.readers import read
from distilvlm.losses import Objective
from distilvlm.models import build, forward
from distilvlm.models.vlm import VLM
from distilvlm.recipe import ModelSpec, SourceSpec, TeacherSpec
from distilvlm.recipe.schema import PictureSpec
from distilvlm.teachers import LocalTeacher, TeacherError
from distilvlm.teachers.own_rows import grid, interpolated
from tests.data.small_data import LLAMA2, exact_tokenizer, llava_row, make_pictures, write_json
from tests.runs.tiny import VISION, language

LARGER = VISION | {"image_size": 32}  # 4 × 4 patches instead of 2 × 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers and a few rows, two of them with pictures."""
    directory = tmp_path_factory.mktemp("own-rows")
    exact_tokenizer().save_pretrained(directory / "bytes")
    other = exact_tokenizer([("d", "Ġ"), ("r", "e")], LLAMA2, eos="</s>", bos="<s>")
    other.save_pretrained(directory / "other")
    names = make_pictures(directory / "pictures", 2)
    rows = [
        llava_row(0, names[0], "what?\n<image>", "red is é"),
        llava_row(1, None, "what?", "re"),
        llava_row(2, names[1], "<image>\nwhat?", "d is"),
    ]
    write_json(directory / "talk.json", rows)
    return directory


def spec(place: Path, tokenizer: str, vision: dict[str, Any], hidden: int, **fields: Any) -> TeacherSpec:
    parts = {"config": language(hidden), "tokenizer": str(place / tokenizer)}
    return TeacherSpec.model_validate({"vision": {"config": vision}, "language": parts, **fields})


def taught(student: VLM, teacher: TeacherSpec, share: bool = True) -> LocalTeacher:
    cpu = torch.device("cpu")
    return LocalTeacher(build(teacher, 1), student, cpu, cpu, share, teacher)


@pytest.fixture(scope="module")
def student(place: Path) -> VLM:
    like = spec(place, "bytes", VISION, 16)
    vlm = build(ModelSpec.model_validate(like.model_dump(by_alias=True, include={"vision", "language"})), 1)
    vlm.model.eval()
    return vlm


def batch_of(place: Path, student: VLM, teacher: LocalTeacher, template: str = "chat"):
    source = read(
        SourceSpec.model_validate(
            {"path": str(place / "talk.json"), "images": str(place / "pictures"), "template": template}
        ),
        "talk",
    )
    layout = student.layout
    data = StageData(
        [source],
        student.tokenizer,
        placeholders=layout.placeholders,
        visual=layout.visual,
        pictures=PictureSpec(),
        size=layout.size,
        max_length=512,
        seed=0,
        teacher=teacher.view,
    )
    return collate([data[0, index] for index in range(3)])


def own_hidden(teacher: LocalTeacher, batch) -> torch.Tensor:
    """[rows of the teacher's batch, d]"""
    vlm = teacher.vlm
    with torch.no_grad():
        features = forward.vision_features(vlm.model, vlm.layout, batch.pictures)
        return forward.hidden_states(vlm.model, vlm.layout, batch, features).flatten(0, 1)


def test_area_interpolation_by_hand():
    rows = torch.arange(16.0).view(1, 16, 1)
    assert interpolated(rows, (4, 4), (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    # 3 × 3 to 2 × 2: windows of two, which share the middle
    assert interpolated(rows[:, :9], (3, 3), (2, 2)).flatten().tolist() == [2.0, 3.0, 5.0, 6.0]
    assert interpolated(rows[:, :4], (2, 2), (4, 4)).view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert torch.equal(interpolated(rows, (4, 4), (4, 4)), rows)


def test_models_without_tokenizers_are_not_compared(place, student):
    """A plan may lack a hub's files."""
    with pytest.raises(TeacherError, match="teacher and student need their tokenizers"):
        taught(replace(student, tokenizer=None), spec(place, "bytes", VISION, 24))


def test_rows_that_are_no_whole_grid_are_refused(student):
    layout = replace(student.layout, placeholders=3, visual=(True,) * 3)
    with pytest.raises(TeacherError, match=r"2 × 2 patches is 3 visual tokens to the teacher .*vision\.select"):
        grid(layout, "teacher")


@pytest.mark.parametrize(
    ("tokens", "vision", "fields", "message"),
    [
        ("other", VISION, {}, r"different tokenizers.*tokens: aligned"),
        ("bytes", LARGER, {}, r"the rows cannot be paired.*visual: interpolate"),
        ("other", LARGER, {"tokens": "aligned"}, r"visual: interpolate"),
        ("bytes", LARGER | {"patch_size": 16}, {}, r"both are fed one canvas.*visual: interpolate"),
        ("bytes", LARGER | {"patch_size": 32}, {"visual": "assignment"}, r"which has only 1: use visual: interpolate"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_option(place, student, tokens, vision, fields, message):
    with pytest.raises(TeacherError, match=message):
        taught(student, spec(place, tokens, vision, 24, **fields))


def test_equal_rows_through_the_aligned_path_are_the_plain_ones(place, student):
    """Same tokenizer, same grid: the teacher gives what it gives when it reads the student's rows."""
    fields = {"tokens": "aligned", "visual": "interpolate"}
    plain, aligned = (taught(student, spec(place, "bytes", VISION, 24, **given)) for given in ({}, fields))
    assert plain.view is None and aligned.view is not None
    batch = batch_of(place, student, aligned)
    rows = torch.cat([batch.response_rows, batch.visual_rows]).unique()
    ours, theirs = plain.targets(batch, rows, None), aligned.targets(batch, rows, None)
    assert ours.hidden is not None and theirs.hidden is not None and theirs.visual is not None
    assert batch.paired is not None and batch.paired.sum() == batch.paired.numel() - 1  # one byte within a letter
    partners = torch.searchsorted(rows, batch.response_rows[batch.paired])
    torch.testing.assert_close(theirs.hidden[partners], ours.hidden[partners])
    seen = ours.hidden[torch.searchsorted(rows, batch.visual_rows)]
    torch.testing.assert_close(theirs.visual.flatten(0, 1), seen)


def test_partners_and_areas_of_another_tokenizer_and_grid(place, student):
    fields = {"tokens": "aligned", "visual": "interpolate"}
    teacher = taught(student, spec(place, "other", LARGER, 24, **fields))
    batch = batch_of(place, student, teacher)
    own = batch.teacher
    assert own is not None and batch.paired is not None
    assert own.pictures is not None and own.pictures.shape[-1] == 32
    hidden = own_hidden(teacher, own)
    rows = torch.cat([batch.response_rows, batch.visual_rows]).unique()
    given = teacher.targets(batch, rows, None)
    assert given.hidden is not None and given.visual is not None
    partners = torch.searchsorted(rows, batch.response_rows[batch.paired])
    torch.testing.assert_close(given.hidden[partners], hidden[own.response_rows])
    seen = hidden[own.visual_rows].view(2, 2, 2, 2, 2, -1)  # [pictures, rows, 2, columns, 2, d]
    torch.testing.assert_close(given.visual, seen.mean(dim=(2, 4)).flatten(1, 2))


def test_terms_that_need_no_answers_ask_for_visual_rows_alone(place, student):
    teacher = taught(student, spec(place, "other", LARGER, 24, tokens="aligned", visual="interpolate"))
    batch = batch_of(place, student, teacher)
    rows = Objective(text=0.0, relation=1.0).rows(batch.response_rows, batch.visual_rows)
    given = teacher.targets(batch, rows, None)
    assert given.hidden is not None and given.hidden.shape == (len(rows), 24)
    assert given.visual is not None and given.visual.shape == (2, 4, 24)


def test_the_same_tokenizer_reads_the_students_template_on_its_own_grid(place, student):
    teacher = taught(student, spec(place, "bytes", LARGER, 24, visual="interpolate"))
    assert teacher.view is not None and teacher.view.tokenizer is student.tokenizer
    batch = batch_of(place, student, teacher)
    assert batch.paired is not None and batch.paired.sum() == batch.paired.numel() - 1


def test_assignment_keeps_all_rows_of_the_teacher(place, student):
    teacher = taught(student, spec(place, "bytes", LARGER, 24, visual="assignment"))
    batch = batch_of(place, student, teacher)
    given = teacher.targets(batch, batch.visual_rows, None)
    assert given.visual is not None and given.visual.shape == (2, 16, 24)
    assert batch.teacher is not None
    hidden = own_hidden(teacher, batch.teacher)
    torch.testing.assert_close(given.visual.flatten(0, 1), hidden[batch.teacher.visual_rows])


def test_a_shared_tower_serves_rows_of_other_tokens(place, student):
    """Features of the student's tower go into the teacher's own rows."""
    like = spec(place, "other", VISION, 16, tokens="aligned")
    teacher = taught(student, like)
    assert teacher.shares_vision
    batch = batch_of(place, student, teacher)
    assert batch.pictures is not None and batch.teacher is not None
    with torch.no_grad():
        features = forward.vision_features(student.model, student.layout, batch.pictures)
    rows = batch.response_rows
    shared, own = teacher.targets(batch, rows, features), teacher.targets(batch, rows, None)
    assert shared.hidden is not None and own.hidden is not None
    torch.testing.assert_close(shared.hidden, own.hidden)


def test_a_batch_that_nothing_is_asked_of_needs_no_rows(place, student):
    teacher = taught(student, spec(place, "other", VISION, 24, tokens="aligned"))
    batch = batch_of(place, student, teacher)
    none = torch.zeros(0, dtype=torch.int64)
    idle = replace(batch, teacher=None, paired=None)
    given = teacher.targets(idle, none, None)
    assert given.hidden is not None and given.hidden.shape == (0, 24)
    with pytest.raises(TeacherError, match="made without them"):
        teacher.targets(idle, batch.response_rows, None)
