"""A mixture is what an epoch of a recipe with these weights shows, and says of each row where it comes from."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from distilvlm import cli
from distilvlm.data import DataError, Order, read
from distilvlm.data.convert import by_name, mix, parts_of, rewrite, weighted
from distilvlm.recipe.schema import SourceSpec

from .small_data import llava_row, make_pictures, write_json


def files(tmp_path: Path) -> dict[str, SourceSpec]:
    sources: dict[str, SourceSpec] = {}
    for name, count in (("chats", 7), ("closed", 4)):
        (picture, *_) = make_pictures(tmp_path / name / "images", 1)
        rows = [
            llava_row(n, picture if n % 2 else None, "<image>\nWhat?" * (n % 2) or "Who?", f"{name} {n}")
            for n in range(count)
        ]
        path = write_json(tmp_path / name / f"{name}.json", rows)
        sources[name] = SourceSpec(path=str(path), images=str(tmp_path / name / "images"))
    return sources


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_mixture_is_an_epoch_of_the_recipe(tmp_path):
    sources = weighted(files(tmp_path), {"closed": 2}, {"chats": 3})
    done = mix(sources, tmp_path / "mixed.jsonl", seed=5)
    rows = lines(done.out)
    shown = Order(11, 11, 5, "mix", mixture=[(7, 3 / 7), (4, 2.0)]).update(0)
    places = [("chats", index) if index < 7 else ("closed", index - 7) for _, index in shown]
    assert [(row["mixed"]["source"], row["mixed"]["row"]) for row in rows] == places
    assert [row["conversations"][1]["value"] for row in rows] == [f"{name} {row}" for name, row in places]
    assert Counter(name for name, _ in places) == {"chats": 3, "closed": 8}
    assert sorted(row["mixed"]["showing"] for row in rows if row["mixed"]["source"] == "closed") == [0] * 4 + [1] * 4
    chats, closed = done.parts.values()
    assert (chats.rows, chats.written, chats.different, chats.left_out) == (7, 3, 3, 4)
    assert (closed.rows, closed.written, closed.different, closed.left_out) == (4, 8, 4, 0)
    assert parts_of(sources) == done.parts
    source = read(SourceSpec(path=str(done.out), images=str(done.images)), "mixed")
    assert not source.bad and len(source.records) == done.rows == 11
    again = mix(sources, tmp_path / "again.jsonl", seed=5)
    assert again.out.read_bytes() == done.out.read_bytes()
    assert lines(mix(sources, tmp_path / "other.jsonl", seed=6).out) != rows
    with pytest.raises(DataError, match=r"mixed\.jsonl is there already"):
        mix(sources, done.out)


def test_a_mixture_of_a_mixture_remembers_both(tmp_path):
    first = mix(files(tmp_path), tmp_path / "first.jsonl")
    spec = SourceSpec(path=str(first.out), images=str(first.images))
    for row in lines(mix({"first": spec}, tmp_path / "second.jsonl").out):
        assert row["mixed"]["source"] == "first" and row["mixed"]["before"]["source"] in ("chats", "closed")


def test_bad_rows_stop_a_mixture_or_are_counted(tmp_path):
    sources = files(tmp_path)
    path = Path(sources["closed"].path)
    rows = json.loads(path.read_text())
    write_json(path, [*rows, {"id": "none"}])
    with pytest.raises(DataError, match="row 4, field 'conversations'"):
        mix(sources, tmp_path / "mixed.jsonl")
    assert not (tmp_path / "mixed.jsonl").exists()
    done = mix(weighted(sources, {"closed": 2}, {}), tmp_path / "mixed.jsonl", on_bad_row="quarantine")
    part = done.parts["closed"]
    assert (part.rows, part.written, part.different, part.bad, part.left_out) == (5, 8, 4, 1, 0)
    assert done.rows == 15 and [fault["row"] for fault in lines(tmp_path / "mixed-bad.jsonl")] == [4]


def test_a_mixture_of_nothing_is_refused(tmp_path):
    empty = SourceSpec(path=str(write_json(tmp_path / "empty.json", [])))
    with pytest.raises(DataError, match=r"empty\.json has no row"):
        mix({"empty": empty}, tmp_path / "mixed.jsonl")
    bad = SourceSpec(path=str(write_json(tmp_path / "bad.json", [{"id": "none"}] * 2)))
    with pytest.raises(DataError, match="no row is left to write; 2 can't be used"):
        mix({"bad": bad}, tmp_path / "mixed.jsonl", on_bad_row="quarantine")


@pytest.mark.parametrize(
    ("weights", "counts", "reason"),
    [
        ({"close": 1}, {}, "no source 'close'; there are chats, closed"),
        ({"closed": 0}, {}, "not above 0"),
        ({"closed": 1}, {"closed": 1}, "a weight and a count"),
    ],
)
def test_weights_that_mean_nothing_are_refused(tmp_path, weights, counts, reason):
    with pytest.raises(DataError, match=reason):
        weighted(files(tmp_path), weights, counts)


def test_files_that_can_not_be_one_are_refused(tmp_path):
    sources = files(tmp_path)
    plain = {**sources, "closed": sources["closed"].model_copy(update={"template": "plain"})}
    with pytest.raises(DataError, match="different templates"):
        mix(plain, tmp_path / "mixed.jsonl")
    shards = rewrite(sources["chats"].path, tmp_path / "shards", "webdataset", images=sources["chats"].images)
    with pytest.raises(DataError, match="convert rows SOURCE --to llava"):
        mix({"shards": SourceSpec(path=str(shards.out))}, tmp_path / "mixed.jsonl")
    pair = {side: [{"from": "human", "value": "?"}, {"from": "gpt", "value": side}] for side in ("chosen", "rejected")}
    pairs = SourceSpec(path=str(write_json(tmp_path / "pairs.json", [pair])))
    with pytest.raises(DataError, match="a file holds one kind"):
        mix({"chats": sources["chats"], "pairs": pairs}, tmp_path / "mixed.jsonl")
    with pytest.raises(DataError, match="two files have the same name"):
        by_name([tmp_path / "a" / "rows.json", tmp_path / "b" / "rows.json"], {})


def test_mix_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)

    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["distilvlm", "data", "mix", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    sources = files(tmp_path)
    paths = [spec.path for spec in sources.values()]
    where = [word for name, spec in sources.items() for word in ("--images", f"{name}={spec.images}")]
    assert command(*paths, *where, "--weight", "closed=2", "--count", "chats=3") == 0
    said = capsys.readouterr().out
    assert "weight: 2.0" in said and "weight: 0.42857142857142855" in said
    out = tmp_path / "mixed.jsonl"
    assert command(*paths, *where, "--weight", "closed=2", "--count", "chats=3", "--out", out) == 0
    said = capsys.readouterr().out
    assert f"{out}: 11 rows" in said and "  mixed:\n    path: mixed.jsonl\n    images: .\n    rows: 11" in said
    assert command(*paths, "--weight", "closed=much") == 2
    assert command(*paths, *where, "--out", out, "--json") == 1
