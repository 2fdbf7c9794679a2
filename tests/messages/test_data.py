"""Messages about data and its conversion that no other test meets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distilvlm.data import DataError, Order
from distilvlm.data.convert import convert
from distilvlm.data.convert.talk import turns
from distilvlm.data.geometry import PictureError, decode
from distilvlm.data.readers import read
from distilvlm.recipe import SourceSpec
from tests.fuzz.inputs import png


def converted(source: Path, format: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(format, source, source.parent / "out.jsonl", **options)
    return str(caught.value)


def yolo(directory: Path, **fields: Any) -> Path:
    file = directory / "data.yaml"
    file.write_text(json.dumps({"train": "images", "names": ["cat"], **fields}))
    (directory / "images").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(directory / "images" / "a.png")
    return file


def test_a_yolo_data_set_that_is_not_whole(tmp_path: Path) -> None:
    assert "`names` must list the classes, or map their numbers to names" in converted(
        yolo(tmp_path, names="cat"), "yolo"
    )
    assert "which is no directory; say where the data set is (images)" in converted(yolo(tmp_path, path="gone"), "yolo")
    assert "'train' names " in (told := converted(yolo(tmp_path, train="gone"), "yolo"))
    assert ", which is not there" in told
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    told = converted(yolo(tmp_path, train="flat"), "yolo")
    assert "lies in no folder `images`, so its label file in `labels` is not known" in told


def test_a_voc_data_set_that_is_not_whole(tmp_path: Path) -> None:
    assert "no directory " in (told := converted(tmp_path / "gone", "voc"))
    assert "name the data set, or the directory of its XML files" in told
    assert "difficult is keep or leave; origin is 0 or 1" in converted(tmp_path, "voc", difficult="maybe")
    (tmp_path / "Annotations").mkdir()
    assert "no XML file in " in converted(tmp_path, "voc")
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("one\n")
    told = converted(tmp_path, "voc", split="val")
    assert " lists 'one', but " in told and "one.xml is not there" in told


def test_rows_of_questions_without_their_fields(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[1, 2]")
    assert "has no row that is an object" in converted(file, "vqa")
    file.write_text('[{"image": "a.png", "answer": "red"}]')
    told = converted(file, "vqa")
    assert "the first row has " in told and "Set question_field to the one that holds the question" in told


def test_a_folder_takes_an_answer_only_of_classes(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cats" / "a.png")
    told = converted(tmp_path, "folders", task="none")
    assert "task: class, " in told and "of which only class takes an answer" in told


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("text", "is no list of turns"),
        ([3], "is no turn with a speaker and a text"),
        ([{"from": "human", "value": 3}], "has no text"),
    ],
)
def test_turns_that_are_none(given: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        turns(given, "conversations")
    assert caught.value.args[1] == expected


def test_a_picture_without_an_extent(tmp_path: Path) -> None:
    (tmp_path / "a.bmp").write_bytes(png(0, 5))
    with pytest.raises(PictureError, match=r"can't be read as a picture|pixels: nothing to see"):
        decode(str(tmp_path / "a.bmp"))


def test_orders_of_nothing() -> None:
    with pytest.raises(ValueError, match="an order needs samples and a batch of at least 1, got 0 and 4"):
        Order(0, 4, 0, "one")
    with pytest.raises(ValueError, match="give the number of epochs or of updates"):
        Order(8, 4, 0, "one").total_updates()


def test_data_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file .*gone\.json"):
        read(SourceSpec(path=str(tmp_path / "gone.json")), "x")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="is a directory; name the JSON or JSONL file in it"):
        read(SourceSpec(path=str(tmp_path / "folder.json")), "x")


def test_a_speaker_that_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"conversations": [{"from": "robot", "value": "hi"}]}]')
    source = read(SourceSpec(path=str(tmp_path / "rows.json")), "x")
    assert source.bad[0].reason == "is 'robot'; known roles are human, user, gpt, assistant, system"


def test_half_an_address(tmp_path: Path) -> None:
    turns = '[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]'
    (tmp_path / "rows.json").write_text(f'[{{"image": "http://[", "conversations": {turns}}}]')
    source = read(SourceSpec(path=str(tmp_path / "rows.json")), "x")
    assert source.bad[0].reason == "is no address of a picture: Invalid IPv6 URL"


def test_columns_and_rows_of_other_forms(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": []}')
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    assert " holds no data file" in converted(tmp_path / "saved", "datasets", images=tmp_path / "pictures")
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [], "_indices_files": [{"filename": "x"}]}')
    told = converted(tmp_path / "saved", "datasets", images=tmp_path / "pictures")
    assert " holds a choice of rows by index: call flatten_indices() before save_to_disk" in told
    told = converted(tmp_path / "saved", "datasets", images=tmp_path / "pictures", split="train")
    assert " is one data set without splits: leave split out" in told
