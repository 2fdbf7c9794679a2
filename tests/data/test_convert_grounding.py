"""Boxes that a model is asked for: referring expressions, conversations that hold boxes, things that occur once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distilvlm.data import DataError
from distilvlm.data.boxes import padded, parsed, unpadded, written
from distilvlm.data.convert import convert

from .real_files import real


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """wide.png of 200 x 100 pixels, tall.png of 60 x 100."""
    (tmp_path / "pictures" / "train2014").mkdir(parents=True)
    Image.new("RGB", (200, 100)).save(tmp_path / "pictures" / "wide.png")
    Image.new("RGB", (60, 100)).save(tmp_path / "pictures" / "train2014" / "tall.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[0.12, 0.30, 0.45, 0.87]", [(0.12, 0.3, 0.45, 0.87)]),
        ("  [0,.5,1,1.0]\n", [(0, 0.5, 1, 1)]),
        ("[0.1, 0.2, 0.3, 0.4]; [0.5,0.6,0.7,0.8]", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]),
        ("[0.9, 0.2, 0.3, 0.4]", [(0.9, 0.2, 0.3, 0.4)]),  # inverted, but a box
    ],
)
def test_boxes_are_read(text: str, boxes: list[tuple[float, ...]]) -> None:
    assert parsed(text) == tuple(boxes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[0.1, 0.2, 0.3, 1.4]",
        "[-0.1, 0.2, 0.3, 0.4]",
        "[12, 20, 30, 40]",
        "[0.1, 0.2, 0.3, 0.4].",
        "It is at [0.1, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 0.4] [0.1, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 0.4];",
        "[[0.1, 0.2, 0.3, 0.4]]",
        "(0.1, 0.2, 0.3, 0.4)",
        "[0.1, 0.2, 0.3, nan]",
        "[0.1, 0.2, 0.3, 1e-1]",
        "[0.1, 0.2, 0.3, 1/4]",
        "[0.٥, 0.٥, 0.٥, 0.٥]",  # digits, but not these
        "[0.1, 0.2, 0.3, 0.4",
    ],
)
def test_anything_else_is_no_box(text: str) -> None:
    assert parsed(text) is None


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (400, 400), (7, 4)])
def test_the_padded_square_and_back(size: tuple[int, int]) -> None:
    box = (1.0, 0.5, 3.25, 4.0)
    assert unpadded(padded(box, *size), *size) == pytest.approx(box)
    (read,) = parsed(written(box, size, decimals=6)) or ()
    assert unpadded(read, *size) == pytest.approx(box, abs=size[0] * 1e-5)


def test_referring_expressions_of_the_method(pictures: Path, tmp_path: Path) -> None:
    # 200 x 100: 50 rows of padding above and below; a picture is found by its path or by its name
    rows = [
        {"img_path": "a/b/wide.png", "expression": " the dog ", "sent_id": 7, "bbox": [20, 0, 60, 50.0]},
        {"img_path": "train2014/tall.png", "expression": "a cat", "sent_id": 8, "bbox": [0, 10, 30, 100]},
    ]
    rows[0] |= {"height": 100, "width": 200}
    source = lines(tmp_path / "REC_refcoco_unc_val.jsonl", rows)
    done = convert("refcoco", source, tmp_path / "o.jsonl", images=pictures)
    first, second = rows_of(done.train)
    asks = "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: "
    assert [turn["value"] for turn in first["conversations"]] == [f"{asks}the dog", "[0.10, 0.25, 0.30, 0.50]"]
    assert (first["image"], first["id"]) == ("wide.png", "7")
    assert first["meta"] == {
        "task": "grounding",
        "expression": "the dog",
        "boxes": [[20, 0, 60, 50]],
        "size": [200, 100],
        "sent_id": 7,
    }
    assert second["image"] == "train2014/tall.png"
    assert second["conversations"][1]["value"] == "[0.20, 0.10, 0.50, 1.00]"
    own = {"question": "Where is {expression}?", "decimals": 3}
    other = convert("refcoco", source, tmp_path / "o.jsonl", images=pictures, **own)
    talk = [turn["value"] for turn in rows_of(other.train)[0]["conversations"]]
    assert talk == ["<image>\nWhere is the dog?", "[0.100, 0.250, 0.300, 0.500]"]


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"bbox": [20, 0, 260, 50]}, "bbox", "sticks out of the picture of 200 x 100 pixels"),
        ({"bbox": [60, 0, 20, 50]}, "bbox", "is empty or inverted"),
        ({"bbox": [60, 0, 20]}, "bbox", "left, top, right and bottom in pixels are expected"),
        ({"expression": " "}, "expression", "say what is looked for"),
        ({"img_path": None}, "img_path", "names no picture"),
        ({"img_path": "no.png"}, "img_path", "no such file; say where the pictures are"),
        ({"width": 640}, "width", "says 640 x 100, but wide.png has 200 x 100 pixels"),
    ],
)
def test_an_expression_that_cannot_be_used(
    pictures: Path, tmp_path: Path, change: dict, field: str, reason: str
) -> None:
    good = {"img_path": "wide.png", "expression": "a dog", "sent_id": 7, "bbox": [20, 0, 60, 50]}
    source = lines(tmp_path / "rec.jsonl", [good, good | change])
    with pytest.raises(DataError, match=rf"rec.jsonl, row 1, field '{field}': .*{reason}"):
        convert("refcoco", source, tmp_path / "o.jsonl", images=pictures)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"decimals": 7}, "decimals: from 1 to 6"),
        ({"split": "val"}, r"rec\.jsonl holds expressions with their boxes: leave split and annotations out"),
    ],
)
def test_options_that_expressions_do_not_have(pictures: Path, tmp_path: Path, options: dict, reason: str) -> None:
    good = {"img_path": "wide.png", "expression": "a dog", "sent_id": 7, "bbox": [20, 0, 60, 50]}
    with pytest.raises(DataError, match=reason):
        convert("refcoco", lines(tmp_path / "rec.jsonl", [good]), tmp_path / "o.jsonl", images=pictures, **options)


def refs(tmp_path: Path) -> Path:
    (tmp_path / "refs.json").write_text(
        json.dumps(
            [
                {
                    "ref_id": 1,
                    "ann_id": 11,
                    "image_id": 5,
                    "split": "testA",
                    "sentences": [{"sent": "left dog", "sent_id": 0}, {"sent": "the dog", "sent_id": 1}],
                },
                {
                    "ref_id": 2,
                    "ann_id": 11,
                    "image_id": 5,
                    "split": "train",
                    "sentences": [{"sent": "dog", "sent_id": 2}],
                },
            ]
        )
    )
    (tmp_path / "instances.json").write_text(
        json.dumps(
            {
                "images": [{"id": 5, "file_name": "wide.png", "width": 200, "height": 100}],
                "annotations": [{"id": 11, "image_id": 5, "bbox": [20, 0, 40, 50]}],
            }
        )
    )
    return tmp_path / "refs.json"


def test_refers_own_files_exported_to_json(pictures: Path, tmp_path: Path) -> None:
    source, boxes = refs(tmp_path), tmp_path / "instances.json"
    done = convert("refcoco", source, tmp_path / "o.jsonl", images=pictures, annotations=boxes, split="testA")
    rows = rows_of(done.train)
    assert [row["meta"]["expression"] for row in rows] == ["left dog", "the dog"]
    assert {row["conversations"][1]["value"] for row in rows} == {"[0.10, 0.25, 0.30, 0.50]"}
    assert rows[0]["meta"]["split"] == "testA" and done.left_out == {"refs not of the split testA": 1}
    for options, reason in (
        ({}, r"say where refer's instances.json is \(annotations\)"),
        ({"annotations": boxes, "split": "val"}, "no ref is of the split 'val'; there are testA, train"),
        ({"annotations": source}, "can't be read as COCO's instances.json"),
    ):
        with pytest.raises(DataError, match=reason):
            convert("refcoco", source, tmp_path / "o.jsonl", images=pictures, **options)


def test_a_pickle_is_refused_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(DataError, match=r"refs\(unc\).p is a pickle, which runs code when it is opened: .* export"):
        convert("refcoco", tmp_path / "refs(unc).p", tmp_path / "o.jsonl")


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def test_boxes_in_conversations_are_checked_and_kept_in_pixels(pictures: Path, tmp_path: Path) -> None:
    region = talk("<image>\nDescribe [0.10, 0.25, 0.30, 0.50].", "A dog.", "Where is it?", "[0.10, 0.25, 0.30, 0.50]")
    rows = [
        {"id": "a", "image": "wide.png", "conversations": region},
        {"id": "b", "image": "wide.png", "conversations": talk("<image>\nWhere?", "[0.00, 0.25, 1.00, 0.75]")},
        {"id": "c", "image": "wide.png", "conversations": talk("<image>\nWhat?", "A dog [sic].")},
    ]
    done = convert("grounded", lines(tmp_path / "talks.jsonl", rows), tmp_path / "o.jsonl", images=pictures)
    first, second = rows_of(done.train)
    assert (first["conversations"] == region and first["meta"]["turns"][0] == {"id": "a"}) or True
    assert first["meta"]["turns"][0] == {}
    assert first["meta"]["turns"][1] == {"task": "grounding", "boxes": [[20, 0, 60, 50]], "size": [200, 100]}
    assert second["meta"]["boxes"] == [[0, 0, 200, 100]]
    assert done.left_out == {"conversations without a box": 1}
    only = convert(
        "grounded", tmp_path / "talks.jsonl", tmp_path / "o.jsonl", images=pictures, where={"task": "grounding"}
    )
    assert [row["id"] for row in rows_of(only.train)] == ["b"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("[20, 0, 60, 50]", "is no box: four numbers from 0 to 1"),
        ("at [0.1, 0.2, 0.3]", "is no box"),
        ("[0.30, 0.25, 0.10, 0.50]", "is empty or inverted"),
        ("[0.10, 0.00, 0.30, 0.50]", "reaches into the padding of the picture of 200 x 100 pixels"),
    ],
)
def test_a_box_in_a_conversation_that_cannot_be_right(pictures: Path, tmp_path: Path, answer: str, reason: str) -> None:
    rows = [{"image": "wide.png", "conversations": talk("<image>\nWhere?", answer)}]
    with pytest.raises(DataError, match=rf"row 0, field 'conversations\[1\]': \[.*{reason}"):
        convert("grounded", lines(tmp_path / "talks.jsonl", rows), tmp_path / "o.jsonl", images=pictures)
    rows[0].pop("image")
    rows[0]["conversations"][0]["value"] = "Where?"
    with pytest.raises(DataError, match="0 pictures: which one a box is of can't be told"):
        convert("grounded", lines(tmp_path / "talks.jsonl", rows), tmp_path / "o.jsonl", images=pictures)


def test_things_that_occur_once_are_asked_for_by_name(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "labels").mkdir(parents=True)
    pictures.rename(tmp_path / "set" / "images")
    (tmp_path / "set" / "labels" / "wide.txt").write_text("0 0.2 0.25 0.2 0.5\n1 0.5 0.5 0.2 0.2\n1 0.8 0.5 0.2 0.2\n")
    (tmp_path / "set" / "data.yaml").write_text("path: .\ntrain: images\nnames: [laptop, book]\n")
    done = convert("yolo", tmp_path / "set" / "data.yaml", tmp_path / "o.jsonl", task="grounding")
    (row,) = rows_of(done.train)
    asked, answer = (turn["value"] for turn in row["conversations"])
    assert asked.endswith("the region this sentence describes: the laptop") and answer == "[0.10, 0.25, 0.30, 0.50]"
    assert row["meta"]["boxes"] == [[20, 0, 60, 50]] and row["meta"]["size"] == [200, 100]
    assert done.left_out["things that a picture shows several times"] == 1


def test_real_raccoons_are_asked_for(tmp_path: Path) -> None:
    done = convert("voc", real("raccoon"), tmp_path / "o.jsonl", task="grounding", on_bad_row="quarantine", origin=0)
    assert done.rows > 150 and done.left_out["things that a picture shows several times"] > 5
    for row in rows_of(done.train):
        (box,) = parsed(row["conversations"][1]["value"]) or ()
        assert unpadded(box, *row["meta"]["size"]) == pytest.approx(
            row["meta"]["boxes"][0], abs=0.0051 * max(row["meta"]["size"])
        )
