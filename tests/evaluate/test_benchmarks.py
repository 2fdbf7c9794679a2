"""Published files in, published files out, and answers that are there already."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distilvlm.data.problems import DataError
from distilvlm.evaluate.hallucination import (
    described,
    read_answers,
    read_mmhal,
    read_objhal,
    read_polling,
    together,
    write_mmhal,
    write_objhal,
)
from distilvlm.evaluate.questions import Asked


def picture(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    (tmp_path / "COCO_val2014_000000310196.jpg").write_bytes(picture())
    rows = [
        {
            "question_id": 1,
            "image": "COCO_val2014_000000310196.jpg",
            "text": "Is there a dog in the image?",
            "label": "yes",
        },
        {
            "question_id": 2,
            "image": "COCO_val2014_000000310196.jpg",
            "text": "Is there a cat in the image?",
            "label": "no",
        },
    ]
    return lines(tmp_path / "coco_pope_popular.json", rows)


def mmhal(path: Path) -> Path:
    row = {
        "question_type": "attribute",
        "question_topic": "outdoor",
        "image_id": "df62a56fdc1bb12b",
        "image_src": "https://example.org/8/7211/7206072054_o.jpg",
        "image_content": ["Fire hydrant"],
        "question": "What colour is the cap?",
        "gt_answer": "It is yellow.",
        "model_answer": "",
    }
    path.write_text(json.dumps([row, row | {"question_type": "holistic", "image_id": "other"}]))
    return path


def test_popes_files_are_read_as_published(pope: Path) -> None:
    asked = read_polling(pope)
    first, second = asked.questions
    assert (first.text, first.answer, first.meta, first.record.id) == (
        "Is there a dog in the image?",
        "yes",
        {"how": "popular"},  # from the file's name
        "1",
    )
    assert first.record.images == second.record.images == (str(pope.parent / "COCO_val2014_000000310196.jpg"),)
    assert second.place == (str(pope), 1, 0) and not asked.bad


def test_our_own_rows_are_polling_questions_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    turns = [{"from": "human", "value": "<image>\nIs there a dog?"}, {"from": "gpt", "value": "no"}]
    more = [{"from": "human", "value": "Is there a cat?"}, {"from": "gpt", "value": "yes"}]
    meta = {"task": "presence", "thing": "dog", "there": False, "how": "adversarial"}
    rows = [
        {"id": "a:dog", "image": "a.png", "conversations": turns, "meta": meta},
        # questions of one picture, joined to one conversation
        {"image": "a.png", "conversations": turns + more, "meta": {"turns": [meta, {**meta, "thing": "cat"}]}},
    ]
    asked = read_polling(lines(tmp_path / "polls.jsonl", rows))
    assert [(one.text, one.answer, one.meta["thing"], one.meta["how"]) for one in asked.questions] == [
        ("Is there a dog?", "no", "dog", "adversarial"),
        ("Is there a dog?", "no", "dog", "adversarial"),
        ("Is there a cat?", "yes", "cat", "adversarial"),
    ]


def test_rows_that_can_not_be_asked_are_named(pope: Path) -> None:
    with pope.open("a") as stream:
        stream.write(json.dumps({"image": "gone.jpg", "text": "Is there a dog?", "label": "yes"}) + "\n")
        stream.write(json.dumps({"image": "COCO_val2014_000000310196.jpg", "text": "?", "label": "maybe"}) + "\n")
        stream.write("{broken\n")
    bad = [(row.key.row, row.field, row.reason) for row in read_polling(pope).bad]
    assert [(row, field) for row, field, _ in bad] == [(2, "image"), (3, "label"), (4, "row")]
    assert "no file gone.jpg" in bad[0][2] and "--images" in bad[0][2]
    assert bad[1][2] == "is 'maybe', neither yes nor no"
    # where answers are there already, nobody looks for pictures
    assert [row.key.row for row in read_polling(pope, pictures=False).bad] == [3, 4]


def test_a_typed_image_token_is_no_picture(pope: Path) -> None:
    row = {"image": "COCO_val2014_000000310196.jpg", "text": "Is there an <image> in it?", "label": "no"}
    asked = read_polling(lines(pope, [row]))
    assert asked.questions[0].record.turns[0].text.count("\ue000") == 1
    assert "<image>" not in asked.questions[0].record.turns[0].text


def test_mmhal_pictures_are_found_by_their_address_or_number(tmp_path: Path) -> None:
    (tmp_path / "7206072054_o.jpg").write_bytes(picture())
    asked = read_mmhal(mmhal(tmp_path / "template.json"))
    assert [one.record.images for one in asked.questions] == [(str(tmp_path / "7206072054_o.jpg"),)] * 2
    assert asked.questions[0].meta["image_content"] == ["Fire hydrant"]
    assert (asked.questions[0].text, asked.questions[0].answer) == ("What colour is the cap?", "It is yellow.")
    (tmp_path / "7206072054_o.jpg").rename(tmp_path / "other.jpeg")
    found = read_mmhal(tmp_path / "template.json")
    assert [row.key.row for row in found.bad] == [0]
    assert found.questions[0].record.images == (str(tmp_path / "other.jpeg"),)


def test_what_is_in_a_picture_is_a_list(tmp_path: Path) -> None:
    row = json.loads(mmhal(tmp_path / "response_template.json").read_text())[0]
    file = lines(tmp_path / "rows.jsonl", [row | {"image_content": "Fire hydrant"}])
    (bad,) = read_mmhal(file, pictures=False).bad
    assert (bad.field, bad.reason) == ("image_content", "is no list of what is in the picture")


def test_mmhal_answers_are_written_as_its_script_reads_them(tmp_path: Path) -> None:
    asked = read_mmhal(mmhal(tmp_path / "template.json"), pictures=False)
    write_mmhal(tmp_path / "out.json", asked, ["yellow", "a hydrant"])
    given = json.loads((tmp_path / "template.json").read_text())
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == [row | {"model_answer": text} for row, text in zip(given, ["yellow", "a hydrant"], strict=True)]
    # a row that could not be asked keeps what it had
    write_mmhal(tmp_path / "out.json", Asked(asked.name, asked.questions[1:]), ["a hydrant"])
    assert [row["model_answer"] for row in json.loads((tmp_path / "out.json").read_text())] == ["", "a hydrant"]
    assert read_answers(tmp_path / "out.json", asked.questions) == ["", "a hydrant"]


def test_object_halbench_pictures_in_the_file_are_written_once(tmp_path: Path) -> None:
    rows = [
        {"image_id": 42, "org_idx": 3, "question": "Describe it.", "image": base64.b64encode(picture()).decode()},
        {"image_id": 43, "org_idx": 4, "question": "Describe it.", "image": base64.b64encode(picture("blue")).decode()},
        {"image_id": 44, "question": "Describe it.", "image": "bm8gcGljdHVyZQ=="},
    ]
    file = lines(tmp_path / "obj.jsonl", rows)
    asked = read_objhal(file)
    kept = sorted((tmp_path / "pictures").iterdir())
    assert sorted(path for one in asked.questions for path in one.record.images) == [str(path) for path in kept]
    assert Path(asked.questions[0].record.images[0]).read_bytes() == picture()
    assert [(row.key.row, row.field) for row in asked.bad] == [(2, "image")]
    again = [path.stat().st_mtime_ns for path in kept]
    read_objhal(file)
    assert [path.stat().st_mtime_ns for path in kept] == again


def test_object_halbench_pictures_may_lie_in_cocos_folder(tmp_path: Path) -> None:
    (tmp_path / "COCO_val2014_000000000042.jpg").write_bytes(picture())
    file = lines(tmp_path / "obj.jsonl", [{"image_id": 42, "question": "Describe it."}])
    (one,) = read_objhal(file, tmp_path).questions
    assert one.record.images == (str(tmp_path / "COCO_val2014_000000000042.jpg"),)


def test_object_halbench_answers_are_written_as_its_script_reads_them(tmp_path: Path) -> None:
    file = lines(tmp_path / "obj.jsonl", [{"image_id": 42, "question": "Describe it.", "org_idx": 1}])
    asked = read_objhal(file, pictures=False)
    write_objhal(tmp_path / "out.jsonl", asked, ["a dog"], "mine")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "question_id": 0,
        "image_id": 42,
        "prompt": "Describe it.",
        "text": "a dog",
        "model_id": "mine",
    }
    assert not (tmp_path / "pictures").exists()
    captions = described(tmp_path / "out.jsonl")
    assert captions.questions[0].meta == {"image_id": 42} and captions.questions[0].text == "Describe it."
    assert read_answers(tmp_path / "out.jsonl", captions.questions) == ["a dog"]


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"question": "Is there a dog in the image?", "answer": "Yes"},
            {"question": "Is there a cat in the image?", "answer": "No"},
        ],
        [{"question_id": 2, "text": "No"}, {"question_id": 1, "text": "Yes"}],  # by number, not by order
        [{"prediction": "Yes", "row": 0, "turn": 0}, {"prediction": "No", "row": 1, "turn": 0}],
        [{"prediction": "No", "row": 1, "turn": 0}, {"prediction": "Yes", "row": 0, "turn": 0, "answer": "yes"}],
        [{"prompt": "<image>\nIs there a dog in the image?", "text": "Yes"}, {"caption": "No"}],
    ],
)
def test_answers_are_read_in_the_forms_they_come_in(pope: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    questions = read_polling(pope).questions
    assert read_answers(lines(tmp_path / "answers.jsonl", rows), questions) == ["Yes", "No"]
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    assert read_answers(tmp_path / "answers.json", questions) == ["Yes", "No"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "Yes"}], r"has 1 answers for 2 questions"),
        ([{"text": "Yes"}, {"txt": "No"}], r"row 1: no answer: write it as prediction"),
        ([{"text": "No", "prompt": "Is there a cat in the image?"}, {"text": "Yes"}], r"row 0 answers 'Is there a cat"),
    ],
)
def test_answers_that_fit_no_question_are_refused(
    pope: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_answers(lines(tmp_path / "answers.jsonl", rows), read_polling(pope).questions)


def test_several_files_are_asked_as_one(pope: Path) -> None:
    other = pope.with_name("coco_pope_random.json")
    other.write_bytes(pope.read_bytes())
    asked = together([read_polling(pope), read_polling(other)])
    assert [one.meta["how"] for one in asked.questions] == ["popular"] * 2 + ["random"] * 2


def test_captions_without_a_picture_are_refused(tmp_path: Path) -> None:
    file = lines(tmp_path / "captions.jsonl", [{"image_id": 1, "caption": "a"}, {"caption": "b"}])
    with pytest.raises(DataError, match=r"captions\.jsonl, row 1: no 'image_id' and no 'image'"):
        described(file)
