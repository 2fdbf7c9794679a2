"""What `data stats` and `data check` count, as library and as typed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from distilvlm import cli
from distilvlm.data import read
from distilvlm.data.contents import look
from distilvlm.data.statistics import PictureStatistics, Spread, describe, shared
from distilvlm.recipe.schema import SourceSpec
from tests.runs.tiny import write_recipe

from .small_data import llava_row, make_pictures, make_tokenizer, write_json


@pytest.fixture(autouse=True)
def keep_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["distilvlm", "data", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    names = make_pictures(tmp_path / "images", 4)
    rows = [
        llava_row(0, names[0], "<image>\nis it red?", "Yes"),
        llava_row(1, names[0], "<image>\nis it blue?", "yes ", "and green?", "a little"),
        llava_row(2, names[1], "<image>\nis it red?", "no"),
        llava_row(3, None, "who?", "yes"),
        llava_row(4, "gone.png", "<image>\nwho?", "no"),
    ]
    return write_json(tmp_path / "train.json", rows)


def source_of(path: Path, images: Path):
    return read(SourceSpec(path=str(path), images=str(images)), path.stem)


def test_a_source_is_counted(tmp_path, train):
    found = describe(source_of(train, tmp_path / "images"))
    assert (found.rows, found.bad, found.with_pictures, found.pictures) == (4, 1, 3, 2)
    assert (found.answers, found.different_answers, found.different_questions) == (5, 3, 4)
    assert found.common == (("Yes", 3), ("a little", 1), ("no", 1))
    assert found.majority == 3 / 5
    assert found.answers_per_row == {1: 3, 2: 1}
    assert found.words == Spread(mean=(4 + 8 + 4 + 2) / 4, median=4, ninetieth=8, longest=8)
    assert found.answer_words.longest == 2


def test_shared_pictures_are_found_by_file_and_by_content(tmp_path, train):
    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "images" / "copy.png")
    rows = [llava_row(n, name, "<image>\nq", "a") for n, name in enumerate(["0.png", "copy.png", "copy.png", "3.png"])]
    test = source_of(write_json(tmp_path / "test.json", rows), tmp_path / "images")
    first = source_of(train, tmp_path / "images")
    by_file = shared(first, test)
    assert (by_file.pictures, by_file.rows) == (1, 1)
    by_content = shared(first, test, content=True)
    assert (by_content.pictures, by_content.rows) == (2, 3)
    assert [Path(name).name for name in by_content.examples[1]] == ["1.png", "copy.png"]
    assert shared(first, source_of(write_json(tmp_path / "other.json", rows[3:]), tmp_path / "images")).pictures == 0


def test_broken_pictures_are_found_by_header_or_by_decoding(tmp_path, train):
    whole = (tmp_path / "images" / "1.png").read_bytes()
    (tmp_path / "images" / "1.png").write_bytes(whole[:600])
    source = source_of(train, tmp_path / "images")
    assert look(source).bad() == []
    assert [row.key.row for row in look(source, decoded=True).bad()] == [2]
    (tmp_path / "images" / "0.png").write_bytes(b"x")
    assert [row.key.row for row in look(source).bad()] == [0, 1]


def test_sizes_of_pictures_are_of_the_upright_ones(tmp_path):
    names = make_pictures(tmp_path, 3, side=20)  # 20 x 20, 24 x 20, 28 x 20
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "2.png").save(tmp_path / "2.jpg", exif=exif)
    shutil.copy(tmp_path / "0.png", tmp_path / "copy.png")
    rows = [llava_row(n, name, "<image>\nq", "a") for n, name in enumerate([*names[:2], "2.jpg", "copy.png", "2.jpg"])]
    source = source_of(write_json(tmp_path / "rows.json", rows), tmp_path)
    found = PictureStatistics.of(look(source, content=True))
    assert (found.pictures, found.unreadable, found.portrait, found.repeated, found.repeated_rows) == (4, 0, 1, 1, 1)
    assert (found.shorter, found.longer) == ((20,) * 5, (20, 20, 20, 28, 28))
    assert found.aspect == (1, 1, 1, 1.4, 1.4)
    assert PictureStatistics.of(look(source)).repeated is None


def test_tokens_of_texts_are_counted_per_source(tmp_path, train, monkeypatch, capsys):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    images = ("--images", tmp_path / "images", "--tokenizer", tmp_path / "tokenizer", "--workers", 1)
    texts = [
        ("is it red?", "Yes"),
        ("is it blue?", "yes ", "and green?", "a little"),
        ("is it red?", "no"),
        ("who?", "yes"),
    ]
    words = make_tokenizer()

    def count(text: str) -> int:
        return len(words(text)["input_ids"])

    each = [sum(count(text) for text in talk) for talk in texts]
    assert command(monkeypatch, "stats", train, *images, "--max-length", sorted(each)[2], "--json") == 0
    told = json.loads(capsys.readouterr().out)["tokens"]["train"]
    assert (told["tokens"], told["row"][-1], told["longer"]) == (sum(each), max(each), 1)
    assert told["answers"] == sum(count(text) for talk in texts for text in talk[1::2])
    assert command(monkeypatch, "stats", train, *images, "--max-length", 5) == 0
    assert "rows with more than 5" in capsys.readouterr().out
    assert command(monkeypatch, "stats", train, "--max-length", 5) == 1


def test_check_names_every_bad_row_and_fails(tmp_path, train, monkeypatch, capsys):
    images = ("--images", tmp_path / "images")
    assert command(monkeypatch, "check", train, *images) == 1
    said = capsys.readouterr().out
    assert f"{train}, row 4, field 'image': no file {tmp_path / 'images' / 'gone.png'}" in said
    assert "1 of 5 rows can't be used" in said
    assert command(monkeypatch, "check", train, *images, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], [(row["row"], row["field"]) for row in told["bad"]]) == (5, [(4, "image")])
    good = write_json(tmp_path / "good.json", json.loads(train.read_text())[:4])
    assert command(monkeypatch, "check", good, *images) == 0
    assert "0 of 4 rows can't be used" in capsys.readouterr().out


def test_stats_tell_what_train_and_test_share(tmp_path, train, monkeypatch, capsys):
    test = write_json(tmp_path / "test.json", [llava_row(0, "1.png", "<image>\nq", "maybe")])
    arguments = ("stats", train, "--images", tmp_path / "images", "--against", test)
    assert command(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert "train: most common answers: 'Yes' 60.0%" in said
    assert "1 pictures of 'test' (1 rows) are in 'train', too" in said
    assert command(monkeypatch, *arguments, "--json", "--content") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sources"]["train"]["majority"] == 0.6
    assert [(one["first"], one["second"], one["pictures"]) for one in told["shared"]] == [("train", "test", 1)]


def test_a_recipes_stages_are_counted_in_positions(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path)
    assert command(monkeypatch, "check", recipe) == 0
    assert "0 of " in capsys.readouterr().out
    assert command(monkeypatch, "stats", recipe, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    for stage in told["stages"].values():
        assert sum(counts["share"] for counts in stage["sources"].values()) == pytest.approx(1)
        for name, counts in stage["sources"].items():
            assert counts["samples"] == told["sources"][name]["rows"]
            assert 0 < counts["learned"] < counts["tokens"] <= counts["longest"] * counts["samples"]
    first = next(iter(told["stages"]))
    assert command(monkeypatch, "stats", recipe, "--stage", first) == 0
    assert f"stage {first}" in capsys.readouterr().out
    assert command(monkeypatch, "stats", recipe, "--stage", "nowhere") == 1
    assert "no stage 'nowhere'; there are" in capsys.readouterr().err


def test_convert_as_typed(tmp_path, monkeypatch, capsys):
    make_pictures(tmp_path / "raw" / "cat", 3)
    arguments = ("convert", "folders", tmp_path / "raw", "--out", tmp_path / "cats.jsonl")
    assert command(monkeypatch, *arguments, "--question", "Which?") == 0
    said = capsys.readouterr().out
    assert "3 rows, 3 answers, 3 pictures" in said
    assert "  cats:\n    path: cats.jsonl\n    images: raw\n    rows: 3" in said
    assert command(monkeypatch, *arguments, "--where", "class=cat", "--where", "class=dog", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["train"], told["bad"]) == (3, str(tmp_path / "cats.jsonl"), [])
    (tmp_path / "raw" / "cat" / "1.png").write_bytes(b"x")
    assert command(monkeypatch, *arguments) == 1
    assert "--on-bad-row quarantine" in capsys.readouterr().err
    assert command(monkeypatch, *arguments, "--on-bad-row", "quarantine") == 0
    assert "left out: 1 that can't be used, listed in" in capsys.readouterr().out
