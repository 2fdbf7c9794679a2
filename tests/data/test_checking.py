"""What `data check` says of defects and of what is there twice, whatever the rows lie in and however many look."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from distilvlm import cli
from distilvlm.data import BadRow, SampleKey, read
from distilvlm.data.contents import look
from distilvlm.data.convert import rewrite
from distilvlm.data.defects import KINDS, OTHER, grouped, kind_of
from distilvlm.data.parallel import at_most
from distilvlm.recipe.schema import SourceSpec
from tests.runs.tiny import write_recipe

from .small_data import llava_row, make_pictures, mixed_rows, write_json


@pytest.fixture(autouse=True)
def keep_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)


def check(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["distilvlm", "data", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def faulty(tmp_path: Path) -> Path:
    """A row of each of many defects, a good one, and it again; a picture under two names."""
    names = make_pictures(tmp_path, 4)
    shutil.copy(tmp_path / names[0], tmp_path / "copy.png")
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:600])
    (tmp_path / names[2]).write_bytes(b"x")
    good = llava_row(0, names[0], "<image>\nWhat?", "This.")
    rows: list[Any] = [
        good,
        llava_row(1, "gone.png", "<image>\nWhat?", "This."),
        llava_row(2, names[1], "<image>\nWhat?", "This."),
        llava_row(3, names[2], "<image>\nWhat?", "This."),
        llava_row(4, "https://nowhere/a.png", "<image>\nWhat?", "This."),
        {**llava_row(5, None, "<image>\nWhat?", "This."), "image": 5},
        {**llava_row(6, None, "<image>\nWhat?", "This."), "image": [names[3], names[3]]},
        {"id": "7"},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "human", "value": "?"}]},
        llava_row(9, None, "What?", " "),
        {**llava_row(10, None, "What?", "This."), "chosen": [], "rejected": []},
        llava_row(11, None, "What?\ud800", "This."),
        {**good, "id": "again"},
        llava_row(13, "copy.png", "<image>\nWhat else?", "That."),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"id": "14", \n')
    return path


EXPECTED = {
    "missing picture": [1],
    "broken picture": [2, 3],
    "picture elsewhere": [4],
    "picture without a name": [5],
    "pictures and their places differ": [6],
    "no row of a conversation": [7],
    "turns out of order": [8],
    "nothing to learn": [9],
    "preferences that are none": [10],
    "broken text": [11],
    "malformed JSON": [14],
}


def test_every_defect_is_told_by_its_kind_with_what_to_do(tmp_path, monkeypatch, capsys):
    path = faulty(tmp_path)
    assert check(monkeypatch, path, "--decode", "--duplicates", "--out", tmp_path / "all.jsonl") == 1
    said = capsys.readouterr().out
    for kind, rows in EXPECTED.items():
        assert f"{kind}: {'1 row' if len(rows) == 1 else f'{len(rows)} rows'}\n  {path}, row {rows[0]}, field" in said
        assert f"  What to do: {next(one.fix for one in KINDS if one.name == kind)}." in said
    assert (
        f"same row: 1 row, which can be used all the same\n  {path}, row 12, field 'row': says and shows what row 0"
        in said
    )
    assert f"row 13, field 'image': {tmp_path / 'copy.png'} is the same file as {tmp_path / '0.png'}" in said
    assert said.rstrip().endswith("12 of 15 rows can't be used")
    found: dict[str, list[int]] = {}
    for line in (tmp_path / "all.jsonl").read_text().splitlines():
        found.setdefault(json.loads(line)["kind"], []).append(json.loads(line)["row"])
    assert found == {**EXPECTED, "same row": [12], "same picture": [13]}
    assert check(monkeypatch, path, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert {one["kind"]: one["rows"] for one in told["kinds"]} == {
        **{kind: len(rows) for kind, rows in EXPECTED.items()},
        "broken picture": 1,  # whose header is broken, too
    }
    assert [(one["kind"], one["row"]) for one in told["again"]] == [("same row", 12)]


def test_the_first_rows_of_a_kind_are_named_and_the_others_counted(tmp_path, monkeypatch, capsys):
    rows = [llava_row(number, f"gone-{number}.png", "<image>\nWhat?", "This.") for number in range(9)]
    assert check(monkeypatch, write_json(tmp_path / "rows.json", rows)) == 1
    said = capsys.readouterr().out
    assert said.count("field 'image'") == 3 and "... and 6 more" in said and "--out FILE.jsonl" in said


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
def test_shards_are_checked_as_rows_are(to, tmp_path, monkeypatch, capsys):
    names = make_pictures(tmp_path, 3)
    rows = write_json(tmp_path / "rows.json", [*mixed_rows(names, 9), mixed_rows(names, 1)[0]])
    out = rewrite(rows, tmp_path / ("out.parquet" if to == "parquet" else "out"), to, shard_size=4).out
    assert check(monkeypatch, out, "--decode", "--duplicates") == 0
    said = capsys.readouterr().out
    assert "0 of 10 rows can't be used" in said
    if to == "webdataset":  # where each row has a picture of its own
        assert "same picture: 5 rows" in said
        tar = sorted(out.iterdir())[0]
        tar.write_bytes(tar.read_bytes()[:-4096].replace(b"IDAT", b"IDxT", 1))
        assert check(monkeypatch, out, "--decode") == 1


def test_two_processes_see_what_one_sees(tmp_path):
    names = make_pictures(tmp_path, 5)
    shutil.copy(tmp_path / names[1], tmp_path / "copy.png")
    (tmp_path / names[3]).write_bytes(b"x")
    rows = mixed_rows([*names, "copy.png", names[0]], 3000)
    path = write_json(tmp_path / "rows.json", rows)
    source = read(SourceSpec(path=str(path), images=str(tmp_path)), "rows")
    found = []
    seen: list[tuple[int, int, str]] = []
    for workers in (1, 2):
        with at_most(workers):
            seen.clear()
            contents = look(source, decoded=True, content=True, progress=lambda *told: seen.append(told))
            assert seen[-2:] == [(len(source.records), len(source.records), "rows"), (6, 6, "pictures")]
        groups = [[group.tolist() for group in some] for some in (contents.same_rows(), contents.same_pictures())]
        found.append((contents.bad(), groups, contents.sizes.tolist(), contents.problems))
    assert found[0] == found[1]
    shows = [row for row, value in enumerate(rows) if value.get("image") == names[3]]
    assert [row.key.row for row in found[0][0]] == shows and len(shows) > 100
    assert [[contents.path(one) for one in group] for group in found[0][1][1]] == [
        [str(tmp_path / names[1]), str(tmp_path / "copy.png")]
    ]


def test_a_recipes_data_is_checked_by_several_as_by_one(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path)
    assert check(monkeypatch, recipe, "--workers", 2) == 0
    one, two = capsys.readouterr().out, check(monkeypatch, recipe, "--workers", 1)
    assert two == 0 and capsys.readouterr().out == one


def test_kinds_are_in_order_of_frequency_and_unknown_reasons_are_other():
    rows = [
        BadRow(SampleKey("s", "f", n), "image", reason) for n, reason in enumerate(["no file a", "what?", "no file b"])
    ]
    assert [(one.kind.name, len(one.rows)) for one in grouped(rows)] == [("missing picture", 2), ("other", 1)]
    assert kind_of(rows[1]) is OTHER
