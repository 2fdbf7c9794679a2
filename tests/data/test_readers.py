"""Rows of every format become the records that they mean, and every defect is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from distilvlm.data import DataError, raise_or_quarantine, read
from distilvlm.data.records import PICTURE
from distilvlm.recipe.schema import SourceSpec

from .small_data import llava_row, make_pictures, write_json


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    return make_pictures(tmp_path / "images", 3)


def source_of(tmp_path: Path, given: list, name: str = "data.json", **spec):
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in given), encoding="utf-8")
    else:
        write_json(path, given)
    return read(SourceSpec(path=str(path), images=str(tmp_path / "images"), **spec), "talk")


def texts(record) -> list[str]:
    return [turn.text for turn in record.turns]


def test_llava_marker_moves_to_the_front_of_its_turn(tmp_path, pictures):
    rows = [llava_row(0, pictures[0], "What colour is it?\n<image>", "Red.", "Sure?", "Yes.")]
    source = source_of(tmp_path, rows)
    record = source.records[0]
    assert source.format == "llava"
    assert texts(record) == [f"{PICTURE}\nWhat colour is it?", "Red.", "Sure?", "Yes."]
    assert [turn.role for turn in record.turns] == ["user", "assistant"] * 2
    assert record.images == (str(tmp_path / "images" / pictures[0]),)
    assert (record.id, record.key.row, record.key.source) == ("row-0", 0, "talk")


def test_a_list_and_jsonl_of_the_same_rows_give_the_same_records(tmp_path, pictures):
    rows = [llava_row(n, pictures[n % 3], "<image>\nwhät? \u2028 still", "so 😀") for n in range(5)]
    as_list = list(source_of(tmp_path, rows).records)
    as_lines = list(source_of(tmp_path, [json.dumps(r, ensure_ascii=False) for r in rows], "data.jsonl").records)
    assert [(r.id, r.images, r.turns) for r in as_list] == [(r.id, r.images, r.turns) for r in as_lines]


def test_several_pictures_keep_their_places(tmp_path, pictures):
    rows = [{**llava_row(0, None, "<image> or <image>?", "first"), "image": pictures[:2]}]
    record = source_of(tmp_path, rows).records[0]
    assert texts(record)[0] == f"{PICTURE} or {PICTURE}?"
    assert [Path(path).name for path in record.images] == pictures[:2]


def test_missing_marker_is_added_and_counted(tmp_path, pictures):
    source = source_of(tmp_path, [llava_row(0, pictures[0], "what is it?", "red", "sure?", "yes")])
    assert texts(source.records[0])[0] == f"{PICTURE}\nwhat is it?"
    assert source.markers_added == 1


@pytest.mark.parametrize(
    ("image", "question", "answer", "expected", "count"),
    [
        (
            False,
            "how do I write <image> in HTML?",
            "as <image>",
            ["how do I write < image > in HTML?", "as < image >"],
            2,
        ),
        (True, "<image>\nwhat does <image> mean?", "that", [f"{PICTURE}\nwhat does < image > mean?", "that"], 1),
        (True, f"<image>\nodd {PICTURE} glyph", "yes", [f"{PICTURE}\nodd \ufffd glyph", "yes"], 1),
        (True, "<image>\nq", "an <image>", [f"{PICTURE}\nq", "an < image >"], 1),
    ],
)
def test_typed_image_tokens_are_neutralised_and_counted(tmp_path, pictures, image, question, answer, expected, count):
    source = source_of(tmp_path, [llava_row(0, pictures[0] if image else None, question, answer)])
    assert texts(source.records[0]) == expected
    assert source.neutralised == count


def test_messages_with_text_and_parts(tmp_path, pictures):
    local = (tmp_path / "images" / pictures[1]).as_uri()
    rows = [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": local}},
                        {"type": "text", "text": "what is <image>?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "a tag"}]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "look: "}, {"type": "image"}]},
                {"role": "assistant", "content": "red"},
            ],
            "images": [pictures[0]],
        },
        {
            "messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "red"}],
            "images": [pictures[2]],
        },
    ]
    source = source_of(tmp_path, rows, "data.jsonl")
    assert source.format == "messages" and source.bad == []
    first, second, third = source.records
    assert texts(first) == ["be brief", f"{PICTURE}\nwhat is < image >?", "a tag"]
    assert first.images == (str(tmp_path / "images" / pictures[1]),)
    assert texts(second)[0] == f"look: {PICTURE}\n"
    assert texts(third)[0] == f"{PICTURE}\nwhat?"
    assert source.neutralised == 1


def defect(**changes):
    return {**llava_row(0, "0.png", "<image>\nq", "a"), **changes}


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"id": "x", "image": "0.png"}, "conversations", "missing"),
        (defect(conversations="q"), "conversations", "is text, not a list"),
        (defect(conversations=[{"from": "human", "value": 3}]), "conversations[0].value", "a number, not text"),
        (defect(conversations=[{"from": "robot", "value": "q"}]), "conversations[0].from", "'robot'"),
        (defect(image=["0.png", "1.png"]), "conversations", "1 <image> markers for 2 pictures"),
        (defect(image="gone.png"), "image", "no file"),
        (defect(image="https://example.org/a.png"), "image", "not fetched"),
        (defect(image=5), "image", "a number"),
        (llava_row(0, None, "q", "  "), "conversations", "nothing to learn"),
        (llava_row(0, None, "q"), "conversations", "nothing to learn"),
        (
            llava_row(0, None, "half \ud83d", "a"),
            "conversations[0]",
            "character 5 is half of a surrogate pair; write the file anew",
        ),
        (
            defect(image="data:image/png;base64,AAAA"),
            "image",
            "pictures inside the data file are not read: write it to a file and give its path",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            "conversations[1]",
            "must alternate",
        ),
        ("not an object", "row", "is text, not an object"),
    ],
)
def test_a_defect_names_row_field_and_reason(tmp_path, pictures, row, field, reason):
    good = llava_row(0, "1.png", "<image>\nq", "a")
    source = source_of(tmp_path, [good, row, good])
    assert [record.key.row for record in source.records] == [0, 2]
    (bad,) = source.bad
    assert (bad.key.row, bad.field) == (1, field)
    assert reason in bad.reason


def test_messages_show_every_picture_that_is_named(tmp_path, pictures):
    parts = [{"type": "image"}, {"type": "text", "text": "q"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    (bad,) = source_of(tmp_path, [{"messages": talk, "images": pictures}]).bad
    assert (bad.field, bad.reason) == ("images", "2 more than the messages have places for")


def test_leading_answers_are_left_out_and_counted(tmp_path, pictures):
    row = {"conversations": [{"from": "gpt", "value": "hi"}, *llava_row(0, None, "q", "a")["conversations"]]}
    source = source_of(tmp_path, [row])
    assert texts(source.records[0]) == ["q", "a"]
    assert source.answers_dropped == 1


def test_malformed_json_names_file_and_line(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n {"conversations": []},\n {"conversations": [}\n]', encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.json, line 3: row 1 is malformed"):
        read(SourceSpec(path=str(path)), "talk")
    path.write_text('[\n {"conversations": []}', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2.*cut off"):
        read(SourceSpec(path=str(path)), "talk")


def test_a_malformed_line_of_jsonl_costs_that_row_only(tmp_path, pictures):
    good = llava_row(0, None, "q", "a")
    source = source_of(tmp_path, [good, "{broken", "", good], "data.jsonl")
    assert len(source.records) == 2
    assert source.bad[0].key.row == 1 and "line 2" in source.bad[0].reason


def test_number_of_rows_must_be_the_recipes(tmp_path, pictures):
    rows = [llava_row(n, None, "q", "a") for n in range(4)]
    assert len(source_of(tmp_path, rows, rows=4, take=2).records) == 2
    with pytest.raises(DataError, match=r"4 rows, but data\.talk.rows says 5"):
        source_of(tmp_path, rows, rows=5, take=2)


def test_unknown_format_names_the_keys_it_met(tmp_path, pictures):
    with pytest.raises(DataError, match=r"neither 'conversations'.*'prompt'"):
        source_of(tmp_path, [{"prompt": "q"}])


def test_policy_lists_ten_and_the_total_or_hands_over_all(tmp_path, pictures):
    bad = source_of(tmp_path, [defect(image=f"gone{n}.png") for n in range(13)]).bad
    with pytest.raises(DataError) as error:
        raise_or_quarantine(bad, "fatal")
    assert "13 rows" in str(error.value) and "and 3 more" in str(error.value) and "row 9" in str(error.value)
    entries = raise_or_quarantine(bad, "quarantine")
    assert [entry["row"] for entry in entries] == list(range(13))
    assert json.loads(json.dumps(entries[0]))["field"] == "image"
    assert raise_or_quarantine([], "fatal") == []


def test_packed_records_survive_pickling(tmp_path, pictures):
    records = source_of(tmp_path, [llava_row(n, pictures[0], "<image>\nq " + "w " * n, "a") for n in range(4)]).records
    copied = pickle.loads(pickle.dumps(records))
    assert list(copied) == list(records) and copied[-1] == records[3]
    assert records.words.tolist() == [3, 4, 5, 6] and records.pictures.tolist() == [1] * 4
    with pytest.raises(IndexError):
        records[4]
