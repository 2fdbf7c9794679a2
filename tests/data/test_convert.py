"""What every conversion does: whole files or none, splits by picture, conditions, conversations, faults by name."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

from distilvlm.data import DataError, read
from distilvlm.data.convert import convert
from distilvlm.data.convert.items import Item, Turn
from distilvlm.data.convert.split import held_out
from distilvlm.recipe.schema import SourceSpec

from .small_data import make_pictures


def rows_of(path: Path | None) -> list[dict]:
    assert path is not None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask(directory: Path, count: int, per_picture: int = 1) -> Path:
    """A question file, its pictures beside it: kind is open for every third question."""
    names = make_pictures(directory, count)
    rows = [
        {
            "qid": n,
            "image": names[n // per_picture],
            "question": f"q{n}?",
            "answer": f"a{n}",
            "kind": ["open", "yes/no "][n % 3 > 0],
        }
        for n in range(count * per_picture)
    ]
    path = directory / "questions.json"
    path.write_text(json.dumps(rows))
    return path


def test_rows_are_what_the_reader_takes(tmp_path):
    done = convert("vqa", ask(tmp_path, 3), tmp_path / "out.jsonl")
    assert rows_of(done.train)[1] == {
        "id": "1",
        "image": "1.png",
        "conversations": [{"from": "human", "value": "<image>\nq1?"}, {"from": "gpt", "value": "a1"}],
        "meta": {"kind": "yes/no "},
    }
    source = read(SourceSpec(path=str(done.train), images=str(done.images)), "x")
    assert [record.answers for record in source.records] == [("a0",), ("a1",), ("a2",)]
    assert (source.bad, source.markers_added, source.neutralised) == ([], 0, 0)


def test_the_entry_leads_a_recipe_beside_the_file_to_its_pictures(tmp_path):
    done = convert("vqa", ask(tmp_path / "raw", 12), tmp_path / "made" / "q.jsonl", hold_out=0.5)
    entry = done.entry()
    assert "  q-train:\n    path: q-train.jsonl\n    images: ../raw\n    rows: " in entry
    assert entry.count("rows:") == 2 and "  q-test:\n" in entry


def test_conditions_keep_rows_and_count_the_others(tmp_path):
    source = ask(tmp_path, 6)
    done = convert("vqa", source, tmp_path / "out.jsonl", where={"kind": "yes/no"})  # the file's has a space behind it
    assert ([row["id"] for row in rows_of(done.train)], done.left_out) == (
        ["1", "2", "4", "5"],
        {"kind is not yes/no": 2},
    )
    either = convert("vqa", source, tmp_path / "out.jsonl", where={"kind": "open", "answer": ["a0", "a1"]})
    assert [row["id"] for row in rows_of(either.train)] == ["0"]
    numbers = convert("vqa", source, tmp_path / "out.jsonl", where={"qid": 3})
    assert [row["id"] for row in rows_of(numbers.train)] == ["3"]
    with pytest.raises(DataError, match=r"no row has a field 'sort'; there are answer, image, kind, qid, question"):
        convert("vqa", source, tmp_path / "out.jsonl", where={"sort": "open"})
    with pytest.raises(DataError, match=r"no row is left to write; left out: 6 \(kind is not maybe\)"):
        convert("vqa", source, tmp_path / "out.jsonl", where={"kind": "maybe"})


def test_a_pictures_questions_become_one_conversation(tmp_path):
    source = ask(tmp_path, 2, per_picture=5)
    done = convert("vqa", source, tmp_path / "out.jsonl", one_per_picture=True, turns=3)
    rows = rows_of(done.train)
    assert [(row["image"], len(row["conversations"]) // 2) for row in rows] == [
        ("0.png", 3),
        ("0.png", 2),
        ("1.png", 3),
        ("1.png", 2),
    ]
    assert [turn["value"] for turn in rows[1]["conversations"]] == ["<image>\nq3?", "a3", "q4?", "a4"]
    assert rows[1]["meta"]["turns"] == [{"id": "3", "kind": "open"}, {"id": "4", "kind": "yes/no "}]
    assert (done.rows, done.answers, done.pictures) == (4, 10, 2)
    with pytest.raises(DataError, match=r"turns: .* together with one_per_picture"):
        convert("vqa", source, tmp_path / "out.jsonl", turns=3)


def test_a_split_is_by_content_and_seed_whatever_files_are_called(tmp_path):
    source = ask(tmp_path / "one", 30)
    done = convert("vqa", source, tmp_path / "one.jsonl", hold_out=0.4)
    test = {row["image"] for row in rows_of(done.test)}
    assert (done.test_rows, done.test_pictures, done.rows) == (len(test), len(test), 30)
    assert 5 <= len(test) <= 19
    again = convert("vqa", source, tmp_path / "again.jsonl", hold_out=0.4)
    assert [rows_of(done.train), rows_of(done.test)] == [rows_of(again.train), rows_of(again.test)]
    other = convert("vqa", source, tmp_path / "other.jsonl", hold_out=0.4, seed=1)
    assert {row["image"] for row in rows_of(other.test)} != test

    # A copy under another name goes where its content goes, and nothing else moves.
    rows = json.loads(source.read_text())
    for row in list(rows):
        shutil.copy(tmp_path / "one" / row["image"], tmp_path / "one" / f"copy-{row['image']}")
        rows.append({**row, "image": f"copy-{row['image']}"})
    source.write_text(json.dumps(rows[::-1]))
    doubled = convert("vqa", source, tmp_path / "doubled.jsonl", hold_out=0.4)
    assert {row["image"] for row in rows_of(doubled.test)} == test | {f"copy-{name}" for name in test}


def test_pictures_of_one_row_stay_together():
    def item(*images: str) -> Item:
        return Item("f", 0, "0", images, (Turn("human", "q"), Turn("gpt", "a")), {}, {})

    names = [f"{n:03d}" for n in range(60)]
    chained = [item(one, other) for one, other in itertools.pairwise(names[:20])]
    alone = [item(name) for name in names]
    away = held_out([*chained, *alone], 0.5, 0, lambda name: name)
    assert len(set(away[: len(chained) + 20])) == 1  # whoever is linked, by whatever way, goes together
    assert away[len(chained) + 20 :] == held_out(alone[20:], 0.5, 0, lambda name: name)
    assert held_out([*alone, *chained], 0.5, 0, lambda name: name)[60:] == away[: len(chained)]
    text = [item() for _ in range(2)]
    assert len(set(held_out(text, 0.5, 0, lambda name: name))) == 1  # the same text is the same sample


def test_faults_stop_with_names_and_nothing_is_written(tmp_path):
    source = ask(tmp_path / "raw", 5)
    rows = json.loads(source.read_text())
    rows[1]["answer"] = " "
    rows[2]["image"] = "gone.png"
    rows[3] = "text"
    (tmp_path / "raw" / "4.png").write_bytes(b"no picture")
    source.write_text(json.dumps(rows))
    with pytest.raises(DataError) as error:
        convert("vqa", source, tmp_path / "out" / "x.jsonl", hold_out=0.5)
    lines = str(error.value).splitlines()
    assert lines[0] == "4 rows can't be converted:"
    assert lines[1].startswith(f"  {source}, row 1, field 'answer': is missing or empty: fill it in")
    assert "row 2, field 'image': no file" in lines[2] or "row 3" in lines[2]
    assert not (tmp_path / "out").exists()

    done = convert("vqa", source, tmp_path / "out" / "x.jsonl", on_bad_row="quarantine")
    assert [row["id"] for row in rows_of(done.train)] == ["0"]
    assert done.bad_file == tmp_path / "out" / "x-bad.jsonl"
    told = rows_of(done.bad_file)
    assert sorted((row["row"], row["field"]) for row in told) == [(1, "answer"), (2, "image"), (3, "row"), (4, "image")]
    assert len(done.bad) == 4 and all(row["file"] == str(source) and row["reason"] for row in told)


def test_an_old_file_survives_a_failed_conversion(tmp_path):
    source = ask(tmp_path / "raw", 3)
    convert("vqa", source, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "raw" / "1.png").unlink()
    with pytest.raises(DataError, match="row 1, field 'image': no file"):
        convert("vqa", source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "raw"]


def test_nothing_of_an_earlier_conversion_stays_beside_the_new_one(tmp_path):
    source = ask(tmp_path / "raw", 12)
    (tmp_path / "raw" / "3.png").write_bytes(b"x")
    first = convert("vqa", source, tmp_path / "x.jsonl", hold_out=0.5, on_bad_row="quarantine")
    make_pictures(tmp_path / "raw", 12)
    again = convert("vqa", source, tmp_path / "x.jsonl", hold_out=0.5)
    assert (first.train, first.test) == (again.train, again.test)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "x-test.jsonl", "x-train.jsonl"]
    assert len(rows_of(again.train)) + len(rows_of(again.test)) == 12


def test_options_are_refused_early(tmp_path):
    source = ask(tmp_path, 2)
    for settings, message in [
        ({"format": "coco"}, "no format 'coco'; known are folders, yolo"),
        ({"out": tmp_path / "x.json"}, r"must end in \.jsonl"),
        ({"hold_out": 1.0}, "is no share of the pictures"),
        ({"hold_out": 0.0001}, "no picture of 2 fell to the test side"),
        ({"task": "list"}, "format 'vqa' has no option 'task'; it has annotations"),
        ({"question": "{query}"}, r"question '\{query\}': KeyError.*known are .*\{question\}"),
    ]:
        given = {"format": "vqa", "source": source, "out": tmp_path / "x.jsonl", **settings}
        with pytest.raises(DataError, match=message):
            convert(**given)


def test_typed_image_tokens_of_a_question_are_no_pictures(tmp_path):
    make_pictures(tmp_path, 1)
    rows = [{"image": "0.png", "question": "what does <image> mean?", "answer": "red"}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    done = convert("vqa", tmp_path / "q.json", tmp_path / "out.jsonl")
    source = read(SourceSpec(path=str(done.train), images=str(done.images)), "x")
    assert (len(source.records), source.neutralised, source.records[0].turns[0].text.count("\ue000")) == (1, 1, 1)
