"""Rows go through all forms and come back as they were."""

from __future__ import annotations

import base64
import json
import re
import shutil
import tarfile
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from distilvlm.data import DataError, read
from distilvlm.data.convert import forms, rewrite
from distilvlm.data.convert.columns import columns
from distilvlm.data.convert.columns import restored as from_columns
from distilvlm.recipe.schema import SourceSpec

from .small_data import llava_row, make_pictures

TEXT = some.text(some.characters(codec="utf-8"), max_size=12)
ASKED = some.one_of(
    TEXT,
    some.lists(some.sampled_from(["<image>", "<image>\n", "\n", " ", "What?", "\r\n", "a "]), max_size=5).map("".join),
)
PLAIN = some.recursive(
    some.one_of(some.none(), some.booleans(), some.integers(), some.floats(allow_nan=False), TEXT),
    lambda inner: some.one_of(some.lists(inner, max_size=2), some.dictionaries(TEXT, inner, max_size=2)),
    max_leaves=3,
)
TAKEN = {"image", "images", "messages", "prompt", "chosen", "rejected", "completion", "label", "picture_names"}


@some.composite
def talks(draw: Any) -> list[dict[str, Any]]:
    turns = draw(some.lists(some.tuples(ASKED, ASKED), min_size=1, max_size=2))
    more = draw(some.dictionaries(TEXT.filter(lambda key: key not in ("role", "content")), PLAIN, max_size=1))
    made = [{"from": who, "value": text} for pair in turns for who, text in zip(("human", "gpt"), pair, strict=True)]
    return [
        *([{"from": "system", "value": draw(TEXT)}] if draw(some.booleans()) else []),
        *made[:-1],
        {**more, **made[-1]},
    ]


@some.composite
def llava(draw: Any, names: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if draw(some.booleans()):
        row["id"] = draw(some.one_of(TEXT, some.integers(), some.none()))
    shown = some.one_of(some.sampled_from(names), some.lists(some.sampled_from(names), max_size=3), some.none())
    for key in draw(some.sampled_from([(), ("image",), ("image",), ("images",), ("image", "images")])):
        row[key] = draw(shown) if row.get("image") is None else None
    row["conversations"] = draw(talks())
    more = draw(some.dictionaries(TEXT.filter(lambda key: key not in {*TAKEN, *row}), PLAIN, max_size=2))
    return {**more, **row}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    make_pictures(root, 3)
    (root / "far" / "away").mkdir(parents=True)
    shutil.copy(root / "2.png", root / "far" / "away" / "two.png")
    return root


NAMES = ["0.png", "1.png", "far/away/two.png"]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@given(row=llava(NAMES))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_messages_and_columns_give_any_row_back(row: dict[str, Any]) -> None:
    told = forms.to_messages(row)
    assert "conversations" not in told and forms.to_llava(told) == row == forms.to_llava(row)
    made = columns(row, [None] * len(forms.named(row)))
    assert json.dumps(from_columns(made)[0], sort_keys=True) == json.dumps(row, sort_keys=True)


@given(rows=some.lists(llava(NAMES), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_come_back_from_messages_parquet_and_shards(rows, pictures, tmp_path) -> None:
    work = tmp_path / "work"
    try:
        first = write(work / "rows.jsonl", rows)
        said = rewrite(first, work / "messages.jsonl", "messages", images=pictures)
        table = rewrite(said.out, work / "rows.parquet", "parquet", images=pictures)
        shards = rewrite(table.out, work / "shards", "webdataset", shard_size=2)
        assert (shards.files, shards.rows, shards.renamed) == ((len(rows) + 1) // 2, len(rows), 0)
        back = rewrite(shards.out, work / "back.jsonl", "llava", images=work / "kept")
        assert lines(back.out) == rows
        for name in {name for row in rows for name in forms.named(row)}:
            assert (work / "kept" / name).read_bytes() == (pictures / name).read_bytes()
    finally:
        shutil.rmtree(work)


def records(path: Path, images: Path) -> list[Any]:
    source = read(SourceSpec(path=str(path), images=str(images)), "rows")
    return [(record.images, record.turns, record.other, record.desirable) for record in source.records]


@given(row=llava(NAMES))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_training_reads_messages_as_it_reads_the_row(row, pictures, tmp_path) -> None:
    first = write(tmp_path / "row.jsonl", [row])
    (tmp_path / "messages.jsonl").unlink(missing_ok=True)
    said = rewrite(first, tmp_path / "messages.jsonl", "messages", images=pictures)
    assert records(said.out, pictures) == records(first, pictures)


def test_a_picture_in_front_of_a_question_becomes_a_part() -> None:
    row = llava_row(0, "a.jpg", "<image>\nWhat?", "This.", "And?", "That.")
    told = forms.to_messages(row)
    assert told["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "text", "text": "What?"},
    ]
    assert [turn["content"] for turn in told["messages"][1:]] == ["This.", "And?", "That."] and "image" not in told
    behind = forms.to_messages(llava_row(0, "a.jpg", "What?\n<image>", "This."))
    assert (behind["image"], behind["messages"][0]["content"]) == ("a.jpg", "What?\n<image>")


@pytest.mark.parametrize("to", ["messages", "parquet", "webdataset"])
@pytest.mark.parametrize("is_pair", [True, False])
def test_preferences_come_back(to, is_pair, pictures, tmp_path) -> None:
    def side(answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]

    talk = {"chosen": side("A dog."), "rejected": side("A cat.")} if is_pair else {"conversations": side("A dog.")}
    rows = [{"id": "1", "image": name, **talk, **({} if is_pair else {"label": name == "1.png"})} for name in NAMES]
    first = write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / {"messages": "out.jsonl", "parquet": "out.parquet", "webdataset": "out"}[to]
    there = rewrite(first, out, to, images=pictures)
    back = rewrite(there.out, tmp_path / "back.jsonl", "llava", images=pictures if to == "messages" else None)
    assert lines(back.out) == rows
    assert records(back.out, pictures) == records(first, pictures)


def test_shards_are_what_webdataset_reads_and_the_same_bytes_each_time(pictures, tmp_path) -> None:
    rows = [llava_row(0, "0.png", "<image>\nWhat?", "This."), llava_row(1, None, "Who?", "Me.")]
    rows.append({**llava_row(2, None, "<image><image>Which?", "Both."), "image": ["1.png", "far/away/two.png"]})
    first = write(tmp_path / "rows.jsonl", rows)
    for name in ("one", "two"):
        rewrite(first, tmp_path / name / "shards", "webdataset", images=pictures)
    (tar,) = (tmp_path / "one" / "shards").iterdir()
    assert tar.read_bytes() == (tmp_path / "two" / "shards" / tar.name).read_bytes()
    with tarfile.open(tar) as opened:
        assert opened.getnames() == [
            *("000000000.json", "000000000.png", "000000001.json"),
            *("000000002.json", "000000002.0.png", "000000002.1.png"),
        ]
        row = json.load(opened.extractfile("000000002.json") or pytest.fail())
    assert (row["image"], row["picture_names"]) == (
        ["000000002.0.png", "000000002.1.png"],
        ["1.png", "far/away/two.png"],
    )


def test_a_shard_of_others_names_each_of_its_pictures_or_none(pictures, tmp_path) -> None:
    first = write(tmp_path / "rows.jsonl", [llava_row(0, "0.png", "<image>\nWhat?", "This.")])
    (tar,) = rewrite(first, tmp_path / "shards", "webdataset", images=pictures).out.iterdir()
    tar.write_bytes(tar.read_bytes().replace(b'"picture_names": ["0.png"]', b'"picture_names": "0.png"  '))
    with pytest.raises(DataError, match="field 'picture_names': is no list of the names of 1 pictures"):
        rewrite(tar, tmp_path / "back.jsonl", "llava")


def test_names_that_lead_elsewhere_or_to_other_pictures_are_given_up(pictures, tmp_path) -> None:
    rows = [
        llava_row(0, "../pictures/0.png", "<image>\nWhat?", "This."),
        llava_row(1, "1.png", "<image>\nWhat?", "That."),
    ]
    (tmp_path / "pictures").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "pictures" / "0.png")
    (tmp_path / "a").mkdir()
    shutil.copy(pictures / "1.png", tmp_path / "a" / "1.png")
    shards = rewrite(write(tmp_path / "a" / "rows.jsonl", rows), tmp_path / "shards", "webdataset")
    (tmp_path / "kept").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "kept" / "1.png")
    back = rewrite(shards.out, tmp_path / "back.jsonl", "llava", images=tmp_path / "kept")
    assert back.renamed == 2
    first, second = (tmp_path / "kept" / row["image"] for row in lines(back.out))
    assert first.read_bytes() == (pictures / "0.png").read_bytes() and first.parent == tmp_path / "kept"
    assert second.read_bytes() == (pictures / "1.png").read_bytes()
    assert (tmp_path / "kept" / "1.png").read_bytes() == (pictures / "0.png").read_bytes()


def test_a_picture_inside_messages_becomes_a_file(pictures, tmp_path) -> None:
    content = (pictures / "1.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    parts = [{"type": "text", "text": "What is <image>?"}, {"type": "image_url", "image_url": {"url": url}}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "This."}]}
    done = rewrite(write(tmp_path / "rows.jsonl", [row]), tmp_path / "out.jsonl", "llava", images=tmp_path / "kept")
    (made,) = lines(done.out)
    assert made["conversations"][0]["value"] == "What is < image >?<image>\n"
    assert (tmp_path / "kept" / made["image"]).read_bytes() == content


def test_bad_rows_stop_it_or_are_listed_and_nothing_is_half_there(pictures, tmp_path) -> None:
    rows = [
        llava_row(0, "0.png", "<image>\nWhat?", "This."),
        llava_row(1, "gone.png", "<image>\nWhat?", "This."),
        {"id": "2", "prompt": "What?", "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "martian", "value": "?"}]},
    ]
    first = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"(?s)3 rows can't.*row 1, field 'image'.*row 2, field 'chosen'.*row 3"):
        rewrite(first, tmp_path / "shards", "webdataset", images=pictures)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    done = rewrite(first, tmp_path / "shards", "webdataset", images=pictures, on_bad_row="quarantine")
    assert (done.rows, [fault["row"] for fault in lines(tmp_path / "shards-bad.jsonl")]) == (1, [1, 2, 3])
    with pytest.raises(DataError, match="shards is there already"):
        rewrite(first, tmp_path / "shards", "webdataset", images=pictures)
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "shards" / "shards-000000.tar").read_bytes()[:900])
    with pytest.raises(DataError, match="the file is cut off"):
        rewrite(cut, tmp_path / "back.jsonl", "llava")
    assert not (tmp_path / "back.jsonl").exists()


ASKS = [{"type": "image"}, {"type": "text", "text": "?"}]


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "This."}]


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (
            {**llava_row(0, "0.png", "?", "!"), "images": ["1.png"]},
            "images",
            "stands beside 'image': leave the one out",
        ),
        (
            {"chosen": asked(ASKS[0], ASKS[1]), "rejected": asked(ASKS[1]), "image": "0.png"},
            "rejected",
            "shows other pictures than chosen: both must show the same, in order",
        ),
        (
            {"messages": asked(*ASKS), "image": ["0.png", "1.png"]},
            "image",
            "holds another number of pictures than the 1 parts that name none",
        ),
        (llava_row(0, None, "\ud83d", "!"), "row", "holds half of a surrogate pair; write the file anew"),
        (llava_row(0, "data:image/png,x", "?", "!"), "image", "is no data:...;base64 picture"),
        (llava_row(0, "data:;base64,A", "?", "!"), "image", "its base64 is broken: "),
        (
            {**llava_row(0, "0.png", "?", "!"), "picture_names": ["a.png"]},
            "picture_names",
            "is what shards keep pictures' own names in: call the field otherwise",
        ),
    ],
)
def test_a_row_that_has_no_other_form_is_told_by_its_field(row, field, reason, pictures, tmp_path) -> None:
    first = write(tmp_path / "rows.jsonl", [llava_row(0, None, "Who?", "Me."), row])
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 1, field '{field}': .*{re.escape(reason)}"):
        rewrite(first, tmp_path / "shards", "webdataset", images=pictures)


def test_what_can_not_be_written_at_all_is_refused(tmp_path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"conversations": "no turns"}])
    with pytest.raises(DataError, match=r"rows\.jsonl: no row is left to write; 1 can't be used"):
        rewrite(source, tmp_path / "shards", "webdataset", on_bad_row="quarantine")
    with pytest.raises(DataError, match="shard_size: at least 1 row"):
        rewrite(source, tmp_path / "shards", "webdataset", shard_size=0)
    dated = pa.Table.from_pylist([{"when": date(2024, 7, 26), **llava_row(0, None, "?", "!")}])
    pq.write_table(dated, tmp_path / "dated.parquet")
    with pytest.raises(DataError, match="row 0, field 'when': is date, which no JSON holds: leave the column out"):
        rewrite(tmp_path / "dated.parquet", tmp_path / "out.jsonl", "llava")


def test_tables_of_other_writers_are_rows_with_all_that_they_say(pictures, tmp_path) -> None:
    content = (pictures / "0.png").read_bytes()
    talk = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This."}]
    table = pa.Table.from_pylist([{"id": 7, "image": {"bytes": content, "path": None}, "messages": talk, "score": 0.5}])
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match="splits test, train: choose one"):
        rewrite(tmp_path / "data", tmp_path / "out.jsonl", "llava")
    done = rewrite(tmp_path / "data", tmp_path / "out.jsonl", "llava", split="test")
    with pytest.raises(DataError, match="has no splits: leave split out"):
        rewrite(done.out, tmp_path / "again.jsonl", "messages", split="test")
    (row,) = lines(done.out)
    assert (tmp_path / "pictures" / row.pop("image")).read_bytes() == content
    assert row == {
        "id": 7,
        "score": 0.5,
        "conversations": llava_row(0, None, "<image>\nWhat?", "This.")["conversations"],
    }
