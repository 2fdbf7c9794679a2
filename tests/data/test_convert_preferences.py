"""Tables of preferences become pairs and rated answers that the reader takes; what can't is named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distilvlm import cli
from distilvlm.data import DataError, Record, read
from distilvlm.data.convert import Converted, convert
from distilvlm.recipe.schema import SourceSpec

from .small_data import make_pictures, write_json


def rows_of(path: Path | None) -> list[dict[str, Any]]:
    assert path is not None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def records_of(done: Converted) -> list[Record]:
    """What the reader makes of it; all of it, or the test fails."""
    source = read(SourceSpec(path=str(done.train), images=str(done.images)), "x")
    assert (source.bad, source.preferences) == ([], done.preferences)
    return list(source.records)


def sides(record: Record) -> tuple[str, str]:
    return record.answers[-1], record.rejected().answers[-1]


def picture(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def rlaif_row(number: int, colour: int | None = None, **changes: Any) -> dict[str, Any]:
    """A row as openbmb/RLAIF-V-Dataset has it."""
    return {
        "ds_name": "RLAIF-V",
        "image": {"bytes": picture(number if colour is None else colour), "path": f"{number}.jpg"},
        "question": f"What is in picture {number}?",
        "chosen": f"It shows {number}.",
        "rejected": f"It shows {number} and a dog.",
        "origin_dataset": "LCS-558K",
        "origin_split": '{"model": "llava", "type": "detailed description"}',
        "idx": str(100 + number),
        "image_path": f"LCS/{number}.jpg",
        **changes,
    }


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_rlaif_v_becomes_pairs_beside_their_pictures(tmp_path):
    files = tmp_path / "hub"
    parquet(files / "RLAIF-V-Dataset_000.parquet", [rlaif_row(0), rlaif_row(1, chosen=" Two\nlines. ")])
    parquet(files / "RLAIF-V-Dataset_001.parquet", [rlaif_row(2, colour=0)])  # the first picture again
    for source in (files, files / "*.parquet"):
        done = convert("preference", source, tmp_path / "pairs.jsonl")
        assert (done.rows, done.pictures, done.preferences, done.left_out) == (3, 2, "pairs", {})
        assert done.images == tmp_path / "pictures" and len(list(done.images.iterdir())) == 2
        first = rows_of(done.train)[0]
        question = {"from": "human", "value": "<image>\nWhat is in picture 0?"}
        assert first == {
            "id": "100",
            "image": first["image"],
            "chosen": [question, {"from": "gpt", "value": "It shows 0."}],
            "rejected": [question, {"from": "gpt", "value": "It shows 0 and a dog."}],
            "meta": {
                "ds_name": "RLAIF-V",
                "origin_dataset": "LCS-558K",
                "origin_split": '{"model": "llava", "type": "detailed description"}',
                "idx": "100",
                "image_path": "LCS/0.jpg",
            },
        }
        assert (done.images / first["image"]).read_bytes() == picture(0)
        records = records_of(done)
        assert [sides(record) for record in records] == [
            ("It shows 0.", "It shows 0 and a dog."),
            ("Two\nlines.", "It shows 1 and a dog."),
            ("It shows 2.", "It shows 2 and a dog."),
        ]
        assert records[0].images == records[2].images
    one = convert("preference", files / "RLAIF-V-Dataset_001.parquet", tmp_path / "one.jsonl", images=tmp_path / "seen")
    assert (one.rows, one.images) == (1, tmp_path / "seen")


def test_the_same_fields_in_json_name_their_pictures(tmp_path):
    names = make_pictures(tmp_path / "raw", 2)
    rows = [{**rlaif_row(number), "image": name} for number, name in enumerate(names)]
    (tmp_path / "raw" / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in (write_json(tmp_path / "raw" / "pairs.json", rows), tmp_path / "raw" / "pairs.jsonl"):
        done = convert("preference", source, tmp_path / "out.jsonl", where={"idx": "101"})
        assert (done.images, done.left_out) == (tmp_path / "raw", {"idx is not 101": 1})
        assert [sides(record) for record in records_of(done)] == [("It shows 1.", "It shows 1 and a dog.")]
    with pytest.raises(DataError, match="is one file without splits"):
        convert("preference", source, tmp_path / "out.jsonl", split="train")


def test_other_columns_are_told(tmp_path):
    row = {"text": "What?", "image": {"bytes": picture(3), "path": None}, "better": "a", "worse": "b", "prompt": "no"}
    source = parquet(tmp_path / "x.parquet", [row])
    with pytest.raises(DataError, match=r"no column for the chosen \(chosen\); it has .*Set chosen_field"):
        convert("preference", source, tmp_path / "out.jsonl")
    told = {"question_field": "text", "chosen_field": "better", "rejected_field": "worse"}
    (record,) = records_of(convert("preference", source, tmp_path / "out.jsonl", **told))
    assert sides(record) == ("a", "b") and record.turns[0].text.endswith("What?")
    with pytest.raises(DataError, match="no column 'best'"):
        convert("preference", source, tmp_path / "out.jsonl", **{**told, "chosen_field": "best"})


def turn(role: str, *parts: dict[str, Any] | str) -> dict[str, Any]:
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": [{"type": part["type"], "text": part.get("text")} for part in content]}


def test_trls_columns_and_saved_data_sets_are_pairs_too(tmp_path):
    pa = pytest.importorskip("pyarrow")
    ask = turn("user", {"type": "image"}, "What is it?")
    good, bad = turn("assistant", "A dog."), turn("assistant", "A cat.")
    shown = {"images": [{"bytes": picture(9), "path": None}]}
    explicit = {**shown, "prompt": [ask], "chosen": [good], "rejected": [bad]}
    implicit = {**shown, "chosen": [ask, good], "rejected": [ask, bad]}
    for number, row in enumerate((explicit, implicit)):
        done = convert("preference", parquet(tmp_path / f"{number}.parquet", [row]), tmp_path / "out.jsonl")
        assert [sides(record) for record in records_of(done)] == [("A dog.", "A cat.")]
        assert rows_of(done.train)[0]["chosen"][0]["value"] == "<image>\nWhat is it?"
    table = pa.Table.from_pylist([rlaif_row(1), rlaif_row(2)])
    (tmp_path / "saved").mkdir()
    with (
        pa.OSFile(str(tmp_path / "saved" / "data.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as stream,
    ):
        stream.write_table(table)
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    assert convert("preference", tmp_path / "saved", tmp_path / "out.jsonl").rows == 2


def test_what_was_written_can_be_filtered_and_split_again(tmp_path):
    source = parquet(tmp_path / "x.parquet", [rlaif_row(number) for number in range(6)])
    done = convert("preference", source, tmp_path / "pairs.jsonl")
    again = convert("preference", done.train, tmp_path / "again.jsonl", images=done.images)
    assert rows_of(again.train) == rows_of(done.train)
    some = convert("preference", done.train, tmp_path / "some.jsonl", images=done.images, where={"idx": ["101", "103"]})
    assert [row["id"] for row in rows_of(some.train)] == ["101", "103"]
    rated = convert("preference", source, tmp_path / "rated.jsonl", rated=True)
    again = convert("preference", rated.train, tmp_path / "again.jsonl", images=rated.images, where={"label": "true"})
    assert (again.rows, again.preferences) == (6, "rated")
    assert rows_of(again.train) == rows_of(rated.train)[:6]
    with pytest.raises(DataError, match="rated: only pairs become rated answers"):
        convert("preference", rated.train, tmp_path / "again.jsonl", images=rated.images, rated=True)


def test_rated_writes_two_answers_the_good_ones_first(tmp_path):
    source = parquet(tmp_path / "x.parquet", [rlaif_row(number) for number in range(3)])
    done = convert("preference", source, tmp_path / "out.jsonl", rated=True)
    assert (done.rows, done.answers, done.pictures, done.preferences) == (6, 6, 3, "rated")
    made = rows_of(done.train)
    assert [(row["id"], row["label"]) for row in made] == [
        *((f"{100 + number}:chosen", True) for number in range(3)),
        *((f"{100 + number}:rejected", False) for number in range(3)),
    ]
    assert made[3]["conversations"][-1] == {"from": "gpt", "value": "It shows 0 and a dog."}
    assert [record.desirable for record in records_of(done)] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("rated", [False, True])
@pytest.mark.parametrize("pictured", [True, False])
def test_a_hold_out_keeps_both_answers_on_one_side(tmp_path, rated, pictured):
    rows = [rlaif_row(number, image=f"{number}.png" if pictured else None) for number in range(12)]
    make_pictures(tmp_path, 12)
    source = write_json(tmp_path / "x.json", rows)
    done = convert("preference", source, tmp_path / "out.jsonl", rated=rated, hold_out=0.4)
    train, test = ({row["id"].partition(":")[0] for row in rows_of(path)} for path in (done.train, done.test))
    assert train and test and not train & test and len(train | test) == 12
    assert done.rows == (24 if rated else 12) and done.test_rows == (2 if rated else 1) * len(test)


def test_faults_are_named_by_row_and_field(tmp_path):
    rows = [
        rlaif_row(0),
        rlaif_row(1, rejected=" It shows 1. "),
        rlaif_row(2, chosen=None),
        rlaif_row(3, chosen=None, rejected=None),
        rlaif_row(4, question=None),
        rlaif_row(5, image={"bytes": b"nonsense", "path": None}),
        rlaif_row(6, rejected=""),
    ]
    source = parquet(tmp_path / "x.parquet", rows)
    with pytest.raises(
        DataError, match=r"(?s)6 rows can't be converted.*x\.parquet, row 1, field 'rejected': is the same"
    ):
        convert("preference", source, tmp_path / "out.jsonl")
    done = convert("preference", source, tmp_path / "out.jsonl", on_bad_row="quarantine")
    assert [row["id"] for row in rows_of(done.train)] == ["100"]
    found = sorted((fault.row, fault.field) for fault in done.bad)
    assert found == [(1, "rejected"), (2, "chosen"), (3, "chosen"), (4, "chosen"), (5, "image"), (6, "rejected")]
    assert len(rows_of(done.bad_file)) == 6


def test_both_answers_are_about_the_same_pictures(tmp_path):
    names = make_pictures(tmp_path, 2)
    row = {
        side: [{"role": "user", "content": [{"type": "image", "image": name}]}, turn("assistant", f"{side}.")]
        for side, name in zip(("chosen", "rejected"), names, strict=True)
    }
    with pytest.raises(
        DataError, match="row 0, field 'rejected': shows other pictures than chosen: both must show the"
    ):
        convert("preference", write_json(tmp_path / "pairs.json", [row]), tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="field 'chosen': names 1 pictures itself, but not all: write all of one kind"):
        convert("preference", write_json(tmp_path / "pairs.json", [{"image": names[0], **row}]), tmp_path / "out.jsonl")


def test_one_file_holds_one_kind(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    mixed = write_json(tmp_path / "x.json", [pair, {"prompt": "q", "completion": "a", "label": True}])
    with pytest.raises(DataError, match="row 1, field 'chosen'"):
        convert("preference", mixed, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="one_per_picture: answers that are compared or rated can't be joined"):
        convert("preference", write_json(tmp_path / "y.json", [pair]), tmp_path / "out.jsonl", one_per_picture=True)


def test_other_converters_do_not_make_plain_rows_of_preferences(tmp_path):
    source = parquet(tmp_path / "x.parquet", [rlaif_row(0)])
    with pytest.raises(
        DataError, match=r"holds pairs of answers \(chosen, rejected\): distilvlm data convert preference"
    ):
        convert("parquet", source, tmp_path / "out.jsonl")
    fine = convert(
        "parquet", source, tmp_path / "out.jsonl", answer_field="chosen"
    )  # to learn from the good ones alone
    assert rows_of(fine.train)[0]["conversations"][1]["value"] == "It shows 0."
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    pairs = write_json(tmp_path / "pairs.json", [{"chosen": talk, "rejected": talk}])
    rated = write_json(tmp_path / "rated.json", [{"conversations": talk, "label": False}])
    for path in (pairs, rated):
        with pytest.raises(DataError, match="distilvlm data convert preference"):
            convert("conversations", path, tmp_path / "out.jsonl")
    named = write_json(tmp_path / "named.json", [{"conversations": talk, "label": "dog"}])
    assert rows_of(convert("conversations", named, tmp_path / "out.jsonl").train)[0]["meta"] == {"label": "dog"}


def test_preferences_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    source = parquet(tmp_path / "x.parquet", [rlaif_row(number) for number in range(12)])

    def command(*more: str) -> str:
        typed = ["distilvlm", "data", "convert", "preference", str(source), "--out", str(tmp_path / "pd.jsonl"), *more]
        monkeypatch.setattr(sys, "argv", typed)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capsys.readouterr().out

    said = command()
    assert "pd.jsonl: 12 pairs of answers, 12 pictures" in said
    assert "  pd:\n    path: pd.jsonl\n    images: pictures\n    rows: 12" in said
    assert "pairs of answers" in command("--hold-out", "0.5")
    assert "24 rated answers, 12 pictures" in command("--rated")
    assert json.loads(command("--json", "--rated"))["preferences"] == "rated"
