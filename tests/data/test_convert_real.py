"""The converters against published files: what comes out is counted against what the files themselves hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from distilvlm.data import DataError, read
from distilvlm.data.convert import Converted, convert
from distilvlm.recipe.schema import SourceSpec

from .real_files import real


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_read(done: Converted) -> int:
    """How many rows the reader takes; all of them, or the test fails."""
    count = 0
    for path in (done.train, done.test):
        if path is not None:
            source = read(SourceSpec(path=str(path), images=str(done.images)), path.stem)
            assert source.bad == []
            count += len(source.records)
    return count


@pytest.mark.parametrize(("split", "count"), [("train", 3068), ("validation", 341), ("test", 372)])
def test_clothing_has_a_row_per_photograph(tmp_path, split, count):
    source = real("clothing") / split
    done = convert("folders", source, tmp_path / "out.jsonl")
    assert (done.rows, done.pictures, done.left_out, done.bad) == (count, count, {}, ())
    answers = Counter(row["conversations"][1]["value"] for row in rows_of(done.train))
    assert answers == {folder.name: len(list(folder.glob("*.jpg"))) for folder in source.iterdir()}
    assert is_read(done) == count


@pytest.mark.parametrize(("split", "told", "unlabelled"), [("train", 126, 2), ("val", 128, 0)])
def test_coco128_counts_every_box(tmp_path, split, told, unlabelled):
    source = real("coco128")
    names = yaml.safe_load((source / "config.yaml").read_text())["names"]
    pictures = {path.stem for path in (source / f"images/{split}2017").iterdir()}
    assert len(pictures) == 128
    expected: Counter[tuple[str, str]] = Counter()
    for label in (source / f"labels/{split}2017").iterdir():
        if label.stem in pictures:
            expected.update((label.stem, names[int(line.split()[0])]) for line in label.read_text().splitlines())
    detect = convert("yolo", source / "config.yaml", tmp_path / "detect.jsonl", split=split)
    found = Counter()
    for row in rows_of(detect.train):
        boxes = re.findall(r"\[\d\.\d\d(?:, \d\.\d\d){3}\]", row["conversations"][1]["value"])
        assert row["conversations"][1]["value"] == "; ".join(boxes)
        found[Path(row["image"]).stem, row["meta"]["thing"]] += len(boxes)
    assert found == expected
    assert (detect.pictures, detect.left_out.get("pictures without a label file", 0)) == (told, unlabelled)
    assert is_read(detect) == len(expected)

    count = convert("yolo", source / "config.yaml", tmp_path / "count.jsonl", split=split, task="count")
    assert sum(int(row["conversations"][1]["value"]) for row in rows_of(count.train)) == expected.total()
    listed = convert("yolo", source / "config.yaml", tmp_path / "list.jsonl", split=split, task="list", absent=1)
    assert (listed.rows, listed.pictures) == (128, 128)
    assert sum(row["conversations"][1]["value"] == "none" for row in rows_of(listed.train)) == unlabelled


def test_vqa_rad_is_split_by_picture(tmp_path):
    source = real("vqa_rad")
    questions = rows_of(source / "questions.jsonl")
    settings = {"images": source / "images", "hold_out": 0.3}
    done = convert("vqa", source / "questions.jsonl", tmp_path / "all.jsonl", **settings)
    assert done.test is not None
    assert (done.rows, done.pictures) == (2248, 314) == (len(questions), len({row["image_name"] for row in questions}))
    assert len(list((source / "images").iterdir())) == 315  # one has no question
    train, test = ({row["image"] for row in rows_of(path)} for path in (done.train, done.test))
    contents = [
        {hashlib.sha256((source / "images" / name).read_bytes()).digest() for name in side} for side in (train, test)
    ]
    assert not contents[0] & contents[1]
    assert 0.2 < len(test) / 314 < 0.4
    assert is_read(done) == 2248

    kinds = Counter(row["answer_type"].strip() for row in questions)
    for kind in ("CLOSED", "OPEN"):
        part = convert(
            "vqa",
            source / "questions.jsonl",
            tmp_path / f"{kind}.jsonl",
            where={"answer_type": kind},
            one_per_picture=True,
            **settings,
        )
        assert part.test is not None
        assert (part.answers, part.left_out) == (kinds[kind], {f"answer_type is not {kind}": 2248 - kinds[kind]})
        assert part.rows == part.pictures
        # Both kinds are split alike: no test picture of one was trained on with the other.
        assert {row["image"] for row in rows_of(part.test)} <= test
        assert {row["image"] for row in rows_of(part.train)} <= train


def test_raccoons_are_all_found(tmp_path):
    source = real("raccoon")
    done = convert("voc", source, tmp_path / "out.jsonl", hold_out=0.2, seed=1)
    assert (done.rows, done.pictures, done.left_out, done.bad) == (200, 200, {}, ())
    both = rows_of(done.train) + rows_of(done.test or done.train)
    assert sum(len(row["meta"]["boxes"]) for row in both) == 217
    # Four photographs are there twice under different names: both copies are on one side.
    sides = [
        {hashlib.sha256((done.images / r["image"]).read_bytes()).digest() for r in rows_of(p)}
        for p in (done.train, done.test)
        if p
    ]
    assert len(sides[0]) + len(sides[1]) == 196 and not sides[0] & sides[1]


def test_blood_cells_without_size_stop_or_are_listed(tmp_path):
    source = real("bccd")
    with pytest.raises(DataError, match=r"(?s)2 rows can't.*BloodImage_00338\.xml, row 12, field 'bndbox': RBC.*empty"):
        convert("voc", source, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []
    done = convert("voc", source, tmp_path / "out.jsonl", task="count", on_bad_row="quarantine")
    assert (done.pictures, len(done.bad), len(list((source / "images").iterdir()))) == (362, 2, 364)
    expected = Counter()
    for path in (source / "annotations").glob("*.xml"):
        if path.stem not in ("BloodImage_00338", "BloodImage_00343"):
            expected.update(str(name.text) for name in ElementTree.parse(path).iterfind("object/name"))
    found = Counter()
    for row in rows_of(done.train):
        found[row["meta"]["thing"]] += int(row["conversations"][1]["value"])
    assert found == expected
