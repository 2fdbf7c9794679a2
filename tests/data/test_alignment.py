"""Positions of two tokenizers that say the same of the same answer, checked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from distilvlm.data import IGNORED, StageData, Template
from distilvlm.data.alignment import TeacherView, pairs, teachers_row
from distilvlm.data.collate import collate
from distilvlm.data.geometry import canvas, decode
from distilvlm.data.readers import read
from distilvlm.recipe import SourceSpec
from distilvlm.recipe.schema import PictureSpec

from .small_data import (
    CHATML_WITH_BLOCKS,
    LLAMA2,
    exact_tokenizer,
    llava_row,
    make_pictures,
    make_record,
    make_tokenizer,
    write_json,
)

ACROSS_WORDS = [("d", "Ġ"), ("dĠ", "i"), ("r", "e"), ("Ġ", "Ã")]
"""Makes "red is é" the tokens re|d i|s|␣Ã|©: one of two words, one that ends within a letter of two bytes."""


def llama2(merges=()):
    return exact_tokenizer(merges, LLAMA2, eos="</s>", bos="<s>")


def aligned(student, teacher, *turns: str) -> list[tuple[str, str]]:
    """Tokens of both that have a partner."""
    record = make_record(*turns)
    ours, theirs = (Template.of("chat", one).encode(record, 3) for one in (student, teacher))
    found = pairs(ours, theirs)
    columns = [
        one.convert_ids_to_tokens(encoded.input_ids[places].tolist())
        for one, encoded, places in zip((student, teacher), (ours, theirs), found.unbind(1), strict=True)
    ]
    return list(zip(*columns, strict=True))


def test_pairs_of_two_tokenizers_and_templates():
    """Merges across words, a letter of two bytes, white space that only one template writes, other ends of a turn."""
    assert aligned(exact_tokenizer(), llama2(ACROSS_WORDS), "what? é", "red is é") == [
        ("r", "re"),
        ("d", "dĠi"),
        ("s", "s"),
        ("Ġ", "ĠÃ"),
        ("<|im_end|>", "</s>"),
    ]


def test_a_token_that_ends_within_a_letter_leaves_the_next_one_alone():
    student, teacher = exact_tokenizer([("Ġ", "Ã")]), exact_tokenizer([("©", "a")])
    # a|␣Ã|©|a against a|␣|Ã|©a: the last "a" of the student begins where no token of the teacher does.
    assert aligned(student, teacher, "?", "a éa") == [("a", "a"), ("ĠÃ", "Ġ"), ("<|im_end|>", "<|im_end|>")]


def test_a_token_that_begins_in_white_space_of_its_template_begins_the_answer():
    assert aligned(exact_tokenizer(), llama2([("Ġ", "r")]), "?", "red") == [
        ("r", "Ġr"),
        ("e", "e"),
        ("d", "d"),
        ("<|im_end|>", "</s>"),
    ]


def test_white_space_that_both_write_is_of_the_answer():
    assert aligned(exact_tokenizer(), exact_tokenizer([("Ġ", "r")]), "?", " red ") == [
        ("Ġ", "Ġr"),
        ("e", "e"),
        ("d", "d"),
        ("Ġ", "Ġ"),
        ("<|im_end|>", "<|im_end|>"),
    ]


def test_every_answer_has_its_own_places():
    assert aligned(exact_tokenizer([("r", "e")]), llama2(), "?", "re", "?", "err") == [
        ("re", "r"),
        ("<|im_end|>", "</s>"),
        ("e", "e"),
        ("r", "r"),
        ("r", "r"),
        ("<|im_end|>", "</s>"),
    ]


def test_an_end_that_one_of_them_does_not_write_has_no_partner():
    never_ends = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    found = aligned(exact_tokenizer(), exact_tokenizer(chat_template=never_ends, eos="</s>"), "?", "red")
    assert found == [("r", "r"), ("e", "e"), ("d", "d")]


def test_an_answer_that_a_template_changes_has_no_partner():
    cleaning = CHATML_WITH_BLOCKS.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgen",
        "{{ message['content'] | replace('~', '') + '<|im_end|>' }}{% endgen",
    )
    found = aligned(exact_tokenizer(), exact_tokenizer(chat_template=cleaning), "?", "r~e", "?", "d")
    assert found == [("d", "d"), ("<|im_end|>", "<|im_end|>")]


@pytest.mark.parametrize("kind", ["chat", "vicuna"])
def test_the_same_tokenizer_pairs_everything(kind):
    same = make_tokenizer()
    encoded = Template.of(kind, same).encode(make_record("what @ is it?", "red red ", "and?", "it is blué"), 3)
    found = pairs(encoded, encoded)
    learned = (encoded.labels != IGNORED).nonzero().flatten()
    # All but the second byte of the last letter, before which half a letter was read.
    assert found[:, 0].tolist() == found[:, 1].tolist() == [p for p in learned.tolist() if p != int(learned[-2])]


def test_a_cut_row_is_aligned_as_far_as_it_goes():
    record = make_record("?", "red is é")
    whole = Template.of("chat", exact_tokenizer()).encode(record, 3)
    first = int((whole.labels != IGNORED).nonzero()[0])
    cut = Template.of("chat", exact_tokenizer()).encode(record, 3, first + 4)
    theirs = Template.of("chat", llama2(ACROSS_WORDS)).encode(record, 3)
    found = pairs(cut, theirs)
    assert found[:, 0].tolist() == [first, first + 2]
    row = teachers_row(theirs, found[:, 1])
    assert len(row.input_ids) == int(found[-1, 1]) + 1  # nothing of its answer behind the last partner
    assert (row.labels != IGNORED).nonzero().flatten().tolist() == found[:, 1].tolist()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    names = make_pictures(tmp_path / "pictures", 2, side=8)
    rows = [
        llava_row(0, names[0], "what?\n<image>", "red is é"),
        llava_row(1, None, "what?", "re"),
        llava_row(2, names[1], "<image>\nwhat?", "d is"),
    ]
    return write_json(tmp_path / "talk.json", rows)


def stage_data(file: Path, view: TeacherView | None, on_bad_row: Literal["fatal", "quarantine"] = "fatal") -> StageData:
    source = read(SourceSpec(path=str(file), images=str(file.parent / "pictures")), "talk")
    return StageData(
        [source],
        exact_tokenizer(),
        placeholders=4,
        visual=(True,) * 4,
        pictures=PictureSpec(),
        size=16,
        max_length=512,
        seed=0,
        on_bad_row=on_bad_row,
        teacher=view,
    )


def view(size: int = 24) -> TeacherView:
    return TeacherView(llama2(ACROSS_WORDS), 10, (False, *[True] * 9), size)


def test_a_batch_brings_the_teachers_rows_in_the_order_of_its_own(sources):
    data = stage_data(sources, view())
    batch = collate([data[0, index] for index in range(3)])
    teacher = batch.teacher
    assert teacher is not None and batch.paired is not None
    assert teacher.samples == 3
    ours = exact_tokenizer().convert_ids_to_tokens(batch.response_targets[batch.paired].tolist())
    theirs = llama2(ACROSS_WORDS).convert_ids_to_tokens(teacher.response_targets.tolist())
    assert list(zip(ours, theirs, strict=True)) == [
        *[("r", "re"), ("d", "dĠi"), ("s", "s"), ("Ġ", "ĠÃ"), ("<|im_end|>", "</s>")],
        *[("r", "re"), ("<|im_end|>", "</s>")],
        *[("d", "dĠi"), ("s", "s"), ("<|im_end|>", "</s>")],
    ]
    owners = batch.response_rows[batch.paired] // batch.length
    assert owners.tolist() == (teacher.response_rows // teacher.length).tolist()
    assert batch.visual_rows.numel() == 2 * 4 and teacher.visual_rows.numel() == 2 * 9
    assert teacher.placeholder_rows.numel() == 2 * 10


def test_the_teacher_sees_a_canvas_of_its_own_size(sources):
    data = stage_data(sources, view())
    sample = data[0, 2]
    path = data.record(2).images[0]
    assert sample.teacher is not None and sample.teacher.pictures is not None and sample.pictures is not None
    assert torch.equal(sample.pictures[0], canvas(decode(path), "square", 16))
    assert torch.equal(sample.teacher.pictures[0], canvas(decode(path), "square", 24))


def test_canvases_of_one_size_are_shared(sources):
    batch = collate([stage_data(sources, view(16))[0, index] for index in range(3)])
    assert batch.teacher is not None and batch.teacher.pictures is batch.pictures


def test_the_look_at_the_data_counts_what_is_aligned(sources):
    report = stage_data(sources, view()).check()
    # 10 of "red is é" with its end, 3 of "re", 5 of "d is"; 5, 2 and 3 of them have a partner.
    assert (report.learned, report.paired) == (18, 10)
    assert report.aligned == pytest.approx(10 / 18)
    plain = stage_data(sources, None).check()
    assert plain.aligned is None
    assert "partner" in str(report) and "partner" not in str(plain)


def test_a_stand_in_has_no_partner_and_its_batch_goes_on(sources):
    data = stage_data(sources, view(), on_bad_row="quarantine")
    (sources.parent / "pictures" / "1.png").write_bytes(b"no picture")
    batch = collate([data[0, 2], data[0, 1]])
    assert batch.bad and batch.teacher is not None and batch.paired is not None
    assert int(batch.paired.sum()) == batch.teacher.response_rows.numel() == 2
    alone = collate([data[0, 2]])
    assert alone.teacher is None and not alone.response_rows.numel()


def test_rows_with_and_without_a_teachers_row_do_not_mix(sources):
    with pytest.raises(ValueError, match=r"talk.json, row 1 has no row for the teacher"):
        collate([stage_data(sources, view())[0, 0], stage_data(sources, None)[0, 1]])
