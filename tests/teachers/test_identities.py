"""Keys of records are made once: what they depend on is looked at each time, and what has changed is made anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

from distilvlm.data import StageData
from distilvlm.data.geometry import PictureError
from distilvlm.models.compose import build
from distilvlm.models.vlm import VLM
from distilvlm.teachers import identities as module
from distilvlm.teachers.identities import identities

from .cached_recipe import data_of, loaded, teaching, written

ROWS = 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path)


def student_of(path: Path) -> VLM:
    recipe = loaded(path)
    return build(recipe.student, recipe.seed)


def data(path: Path, student: VLM | None = None, **changes: Any) -> StageData:
    return data_of(loaded(path, **changes), student or student_of(path))["dft"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The records whose identity was made anew."""
    found: list[int] = []
    make = StageData.identity
    monkeypatch.setattr(StageData, "identity", lambda self, index: (found.append(index), make(self, index))[1])
    yield found


def exact(rows: StageData) -> dict[int, Any]:
    return {index: rows.identity(index) for index in range(len(rows))}


def asked(rows: StageData, place: Path) -> dict[int, Any]:
    return dict(identities(rows, range(len(rows)), place))


def test_what_was_asked_before_is_read(path: Path, made: list[int], tmp_path: Path) -> None:
    rows = data(path)
    first = asked(rows, tmp_path / "kept")
    assert made == list(range(ROWS))
    assert asked(data(path), tmp_path / "kept") == first and len(made) == ROWS
    assert first == exact(rows)


def test_a_part_is_added_to_what_is_there(path: Path, made: list[int], tmp_path: Path) -> None:
    rows = data(path)
    place = tmp_path / "kept"
    dict(identities(rows, [3, 5], place))
    whole = asked(rows, place)
    assert made == [3, 5, *(index for index in range(ROWS) if index not in (3, 5))]
    assert whole == exact(rows) and list(whole) == list(range(ROWS))


def test_a_changed_data_file_is_noticed_though_its_size_and_time_are_the_same(
    path: Path, made: list[int], tmp_path: Path
) -> None:
    first = asked(data(path), tmp_path / "kept")
    file = path.parent / "questions.json"
    before = file.stat()
    file.write_text(file.read_text().replace("blue", "gold"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    rows = data(path)
    second = asked(rows, tmp_path / "kept")
    assert second == exact(rows) and second != first and made[ROWS : 2 * ROWS] == list(range(ROWS))


def test_a_changed_picture_is_noticed_and_only_its_records_are_made_anew(
    path: Path, made: list[int], tmp_path: Path
) -> None:
    first = asked(data(path), tmp_path / "kept")
    Image.fromarray(np.zeros((20, 28, 3), np.uint8)).save(path.parent / "pictures" / "4.png")
    second = asked(data(path), tmp_path / "kept")
    assert made[ROWS:] == [4]
    assert second[4].pictures != first[4].pictures and {i: second[i] for i in second if i != 4} == {
        i: first[i] for i in first if i != 4
    }


def test_a_touched_picture_is_looked_at_and_is_the_same(path: Path, made: list[int], tmp_path: Path) -> None:
    first = asked(data(path), tmp_path / "kept")
    os.utime(path.parent / "pictures" / "4.png", ns=(1, 1))
    assert asked(data(path), tmp_path / "kept") == first and made[ROWS:] == [4]


@pytest.mark.parametrize("change", ["tokenizer", "template", "length", "version"])
def test_what_rows_are_written_with_is_noticed(
    path: Path, made: list[int], tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(data(path), tmp_path / "kept")
    student, changes = student_of(path), dict[str, Any]()
    tokenizer: Any = student.tokenizer
    if change == "tokenizer":
        tokenizer.add_tokens(["colour is"])
    elif change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("\n", " ")
    elif change == "length":
        changes["stages.2.max_length"] = 40
    else:
        monkeypatch.setattr(module, "VERSION", 99)
    rows = data(path, student, **changes)
    again = asked(rows, tmp_path / "kept")
    assert made[ROWS : 2 * ROWS] == list(range(ROWS)) and again == exact(rows)


def test_rows_are_told_by_number_when_others_become_unusable(path: Path, made: list[int], tmp_path: Path) -> None:
    first = asked(data(path), tmp_path / "kept")
    file = path.parent / "pictures" / "1.png"
    file.rename(file.with_suffix(".away"))
    rows = data(path)
    good = rows.without(rows.check().bad)
    assert len(good) == ROWS - 1
    second = asked(good, tmp_path / "kept")
    assert list(second.values()) == [first[i] for i in first if i != 1] and len(made) == ROWS


def test_a_run_that_is_started_again_makes_none(path: Path, made: list[int]) -> None:
    content = yaml.safe_load(path.read_text())
    first = teaching(loaded(path))
    assert len(made) == 2 * ROWS  # captions and questions
    second = teaching(loaded(path))
    assert len(made) == 2 * ROWS and list(second.asked.records) == list(first.asked.records)
    assert second.asked.bytes == first.asked.bytes
    kept = sorted((Path(content["teacher"]["keep"]["path"]) / "identities").iterdir())
    assert len(kept) == 2 and all(len(load_file(file)["rows"]) == ROWS for file in kept)


def test_what_was_made_before_an_error_is_kept(path: Path, made: list[int], tmp_path: Path) -> None:
    rows = data(path)
    picture = path.parent / "pictures" / "6.png"
    picture.rename(picture.with_suffix(".away"))
    with pytest.raises(PictureError, match=r"6\.png"):
        asked(rows, tmp_path / "kept")
    picture.with_suffix(".away").rename(picture)
    asked(data(path), tmp_path / "kept")
    assert made == [*range(7), *range(6, ROWS)]
