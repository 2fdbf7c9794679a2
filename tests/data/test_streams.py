"""Rows are read where they lie: places are json's own, shards are like files, and whatever breaks has a name."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilvlm.data import DataError, Order, StageData, read, shares
from distilvlm.data.geometry import PictureError, content, decode, problem
from distilvlm.data.parallel import mapped
from distilvlm.data.streams import JsonRows, MalformedRow, json_rows, open_rows, scanning, survey
from distilvlm.data.streams.scanning import list_rows
from distilvlm.recipe.schema import PictureSpec, SourceSpec
from distilvlm.storage import reader as readers
from distilvlm.storage import state

from .small_data import llava_row, make_pictures, make_tokenizer, write_json


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTILVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def read_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of gigabytes are."""
    monkeypatch.setattr(json_rows, "KEPT_FROM", 0)
    monkeypatch.setattr(survey, "PAYS", 0)


values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(alphabet='a"\\{}[],:\n\u2028é😀 '),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='k"\\,]}', max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(values, max_size=5), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_rows_of_a_list_are_those_that_json_reads(rows, block, indent, ascii, bom):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii).replace("\n", "\r\n" if indent else "\n")
    data = b"\xef\xbb\xbf" * bom + text.encode() + b" \r\n"
    start = data.index(b"[")
    scan = list_rows((data[at : at + block] for at in range(start, len(data), block)), start)
    bounds = [*np.concatenate(scan.bounds).tolist(), scan.end + 1]
    found = [data[first : last - 1] for first, last in itertools.pairwise(bounds)]
    assert [json.loads(one) for one in found if one.strip() or rows] == rows
    assert scan.after is None and scan.end == len(data) - 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text("k\\"), values, max_size=3), min_size=1, max_size=5), st.data())
def test_lines_are_rows_and_blank_ones_are_none(tmp_path_factory, rows, data):
    ends = data.draw(
        st.lists(st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]), min_size=len(rows), max_size=len(rows))
    )
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row, end in zip(rows, ends, strict=True))
    path.write_bytes(text.encode())
    found = JsonRows(str(path))
    assert [found[row] for row in range(len(found))] == list(found.stretch(0, len(found))) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a" 2}, {"a": 3}]', "line 1: row 1 is malformed JSON"),
        ('[{"a": 1},\n]', "line 2: row 1 is malformed JSON: Expecting value"),
        ('[{"a": 1} {"b": 2}]', "row 0 is malformed JSON: Extra data"),
        ('[{"a": "x]}', "row 0 is malformed JSON"),
        ('[{"a": 1}', "line 1: malformed JSON after row 0: the file ends inside the list"),
        ('[{"a": 1}]\n x', "line 2: something follows"),
        ('[{"a": 1}]]', "something follows"),
        ("", "is empty"),
        ("42", "begins with '4'"),
        ("[" * 100_000, "row 0 is malformed"),
        ('[{"a": ' + "9" * 5000 + "}]", "row 0 is malformed"),
    ],
)
def test_what_is_no_list_of_rows_is_told_with_its_place(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text, newline="")
    with pytest.raises(DataError, match=r"a\.json") as error:
        list(open_rows(str(path)).stretch(0, len(open_rows(str(path)))))
    assert message in str(error.value)


def test_bytes_that_are_no_utf8_are_told(tmp_path):
    path = tmp_path / "a.json"
    for content_, at in ((b'[{"a": "\xff"}]', 8), ("[1]".encode("utf-16"), 0)):
        path.write_bytes(content_)
        with pytest.raises(DataError, match=rf"not UTF-8 \(byte {at}\)"):
            list(open_rows(str(path)).stretch(0, 1))


def test_lines_that_are_malformed_know_their_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a" 2}\n')
    first, second = open_rows(str(path)).stretch(0, 2)
    assert first == {"a": 1} and isinstance(second, MalformedRow) and second.reason.startswith("line 4 is malformed")


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    calls: list[int] = []
    before = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: calls.append(1) or before(*given))
    return calls


def test_places_are_kept_until_the_file_changes(tmp_path, monkeypatch, read_on_demand):
    path = write_json(tmp_path / "a.json", [llava_row(n, None, "q", "a") for n in range(5)])
    os.utime(path, ns=(0, 10**18))
    scans = counted(monkeypatch, json_rows, "list_rows")
    for expected in (1, 1):
        assert len(open_rows(str(path))) == 5 and len(scans) == expected
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"a"', b'"b"'))
    os.utime(path, ns=(0, 10**18))  # of the same size and time: its inode tells
    assert open_rows(str(path))[4]["conversations"][1]["value"] == "b" and len(scans) == 2
    write_json(path, [llava_row(n, None, "q", "a") for n in range(7)])
    assert len(open_rows(str(path))) == 7 and len(scans) == 3


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, read_on_demand):
    path = write_json(tmp_path / "a.json", [llava_row(n, None, "q", "a") for n in range(3)])
    source = read(SourceSpec(path=str(path)), "talk")
    write_json(path, [llava_row(n, None, "q", "other") for n in range(3)])
    with pytest.raises(OSError, match="was changed while it is in use"):
        source.records[1]
    with pytest.raises(OSError, match="was changed while it is in use"):
        pickle.loads(pickle.dumps(source.records))


def test_what_is_known_of_rows_is_kept_and_pictures_are_looked_for_again(tmp_path, monkeypatch, read_on_demand):
    names = make_pictures(tmp_path / "images", 2)
    rows = [llava_row(n, [*names, "2.png"][n % 3], "<image>\nq", "a") for n in range(9)]
    path = write_json(tmp_path / "a.json", rows)
    for place in (path, tmp_path / "images"):
        os.utime(place, ns=(0, 10**18))
    spec = SourceSpec(path=str(path), images=str(tmp_path / "images"))
    looks = counted(monkeypatch, survey, "_look")
    first, second = read(spec, "talk"), read(spec, "talk")
    assert len(looks) == 1
    assert [row.key.row for row in second.bad] == [2, 5, 8] and second.bad == first.bad
    assert list(second.records) == list(first.records) == [first.records[n] for n in range(6)]
    make_pictures(tmp_path / "images", 3)
    assert read(spec, "talk").bad == [] and len(looks) == 2


def test_held_and_on_demand_tell_the_same(tmp_path, monkeypatch):
    names = make_pictures(tmp_path, 3)
    rows = [llava_row(n, names[n % 3], "<image>\nq <image>" if n % 4 else "q", "a " * n) for n in range(20)]
    rows[7] = {"image": "0.png"}
    path = write_json(tmp_path / "a.json", rows)
    held = read(SourceSpec(path=str(path), take=18), "talk")
    monkeypatch.setattr(json_rows, "KEPT_FROM", 0)
    monkeypatch.setattr(survey, "PAYS", 0)
    monkeypatch.setattr(survey, "SHARED", 0)
    monkeypatch.setattr(survey, "STRETCH", 3)
    monkeypatch.setattr("distilvlm.data.parallel.cores", lambda: 2)
    read_again = read(SourceSpec(path=str(path), take=18), "talk")
    assert list(held.records) == list(read_again.records) and held.bad == read_again.bad
    for name in ("rows", "words", "pictures"):
        assert np.array_equal(getattr(held.records, name), getattr(read_again.records, name))
    assert (held.neutralised, held.markers_added) == (read_again.neutralised, read_again.markers_added)
    assert held.neutralised and held.markers_added


def test_several_processes_give_results_in_order_and_errors_as_they_are():
    assert list(mapped(_square, range(7), 2)) == [number * number for number in range(7)]
    with pytest.raises(ValueError, match=r"^three$"):
        list(mapped(_not_three, range(7), 2))


def _square(number: int) -> int:
    return number * number


def _not_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


def make_shard(path: str, rows: list[dict[str, Any]], pictures: dict[str, bytes]) -> bytes:
    """A shard of KEY.json and KEY.png, written to a file or a store."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for row in rows:
            for name, data in ((f"{row['id']}.json", json.dumps(row).encode()), (row.get("image"), None)):
                if name is not None:
                    data = pictures[name] if data is None else data
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    with fsspec.open(path, "wb") as stream:
        stream.write(written.getvalue())
    return written.getvalue()


@pytest.fixture
def shown(tmp_path: Path) -> dict[str, bytes]:
    """Pictures of their own rows."""
    names = make_pictures(tmp_path / "made", 12, side=4)
    return {f"{number:03d}.png": (tmp_path / "made" / name).read_bytes() for number, name in enumerate(names)}


def sample_rows(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {**llava_row(n, f"{n:03d}.png", "<image>\nq", f"answer {n}"), "id": f"{n:03d}"}
        for n in range(first, first + count)
    ]


@pytest.mark.parametrize("place", ["{tmp}/x-{n}.tar", "memory:///{id}/x-{n}.tar"])
def test_shards_are_read_as_files_are_from_disk_and_from_a_store(tmp_path, shown, place):
    def at(n: object) -> str:
        return place.format(tmp=tmp_path, id=tmp_path.name, n=n)

    sizes = [len(make_shard(at(number), sample_rows(4 * number, 4), shown)) for number in range(3)]
    for pattern in (at("*"), at("{0..2}")):
        source = read(SourceSpec(path=pattern), "talk")
        assert source.bad == [] and len(source.records) == 12
        for number, record in enumerate(source.records):
            assert record.answers == (f"answer {number}",)
            assert decode(record.images[0]).size == (4 + 4 * number, 4)
            assert state(record.images[0])[0] == sizes[number // 4]
            assert content(record.images[0]) == hashlib.sha256(shown[f"{number:03d}.png"]).hexdigest()
            assert Path(record.images[0]).suffix == ".png"
        assert source.records[5].key.row == 5 and source.records[5].key.file == f"{at(1)}#005"
        assert source.records.blocks.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        again = pickle.loads(pickle.dumps(source.records))
        assert list(again) == [source.records[number] for number in range(12)]


def test_a_shard_is_indexed_once_and_again_when_it_changes(tmp_path, shown, cache):
    path = str(tmp_path / "x.tar")
    make_shard(path, sample_rows(0, 3), shown)
    first = open_rows(path)
    files = sorted(file.name for file in cache.iterdir())
    times = [file.stat().st_mtime_ns for file in sorted(cache.iterdir())]
    assert list(open_rows(path).stretch(0, 3)) == list(first.stretch(0, 3))
    assert [file.stat().st_mtime_ns for file in sorted(cache.iterdir())] == times
    make_shard(path, sample_rows(0, 5), shown)
    assert len(open_rows(path)) == 5
    assert len(list(cache.glob("*.arrays"))) == 1 and sorted(f.name for f in cache.iterdir()) != files


def test_without_a_cache_nothing_is_kept_and_all_works(tmp_path, shown, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTILVLM_CACHE", str(tmp_path / "file"))
    make_shard(str(tmp_path / "x.tar"), sample_rows(0, 3), shown)
    assert len(read(SourceSpec(path=str(tmp_path)), "talk").records) == 3


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data.replace(b'"conversations"', b'"conversations ', 1), "000.json is malformed JSON"),
        (lambda data: data.replace(b"IHDR", b"IHDX", 1), "000.png"),
        (lambda data: data.replace(b'"image": "001.png"', b'"image": "999.png"'), "'999.png' is no member"),
        (lambda data: data.replace(b'"image": "001.png"', b'"image": 1        '), "is not the name of a member"),
        (lambda data: data[: 4 * 512] + b"\x01" * 512 + data[5 * 512 :], "are no members of a tar file"),
        (lambda data: data[: 7 * 512 + 20], "the file is cut off"),
    ],
)
def test_what_is_broken_in_a_shard_is_a_bad_row_with_a_name(tmp_path, shown, spoil, said):
    path = tmp_path / "x.tar"
    data = make_shard(str(path), sample_rows(0, 3), shown)
    spoilt = spoil(data)
    assert spoilt != data
    path.write_bytes(spoilt)
    source = read(SourceSpec(path=str(path)), "talk")
    assert any(said in bad.reason and bad.key.file.startswith(f"{path}#") for bad in source.bad), source.bad
    assert len(source.records) + len(source.bad) >= 2 and len(source.records) >= 1


def test_pixels_that_are_broken_behind_a_whole_header_are_told_when_decoded(tmp_path, shown):
    path = tmp_path / "x.tar"
    data = make_shard(str(path), sample_rows(0, 2), shown)
    at = data.index(b"IDAT") + 8
    path.write_bytes(data[:at] + b"\0" * 20 + data[at + 20 :])
    source = read(SourceSpec(path=str(path)), "talk")
    assert source.bad == []
    assert problem(source.records[0].images[0]) is None
    with pytest.raises(PictureError, match=r"x\.tar#000\.png can't be read as a picture"):
        decode(source.records[0].images[0])
    assert decode(source.records[1].images[0]).size == (8, 4)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.tar", b"nothing of the kind", "no tar file"),
        ("x.tar", b"\x1f\x8b\x08\x00", r"x\.tar is compressed: nothing in it can be read at its place; unpack it to a"),
        ("x.tar.gz", b"\x1f\x8b", r"x\.tar\.gz is compressed: nothing in it can be read at its place; unpack it to a"),
        (
            "x.tar",
            b"".join(tarfile.TarInfo(name).tobuf() for name in ("a.txt", "b.txt")),
            "holds no sample: members are KEY",
        ),
        ("x.parquet", b"PAR1", "can't be read"),
    ],
)
def test_what_is_no_shard_is_told(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        read(SourceSpec(path=str(tmp_path / name)), "talk")


def test_patterns_without_files_and_of_two_kinds_are_told(tmp_path, shown):
    with pytest.raises(DataError, match="no file is meant by"):
        read(SourceSpec(path=str(tmp_path / "*.tar")), "talk")
    with pytest.raises(DataError, match=r"no shard .*memory://none/x\.tar"):
        read(SourceSpec(path="memory://none/x.tar"), "talk")
    make_shard(str(tmp_path / "x.tar"), sample_rows(0, 1), shown)
    write_json(tmp_path / "x.json", [])
    with pytest.raises(DataError, match="different kinds"):
        read(SourceSpec(path=str(tmp_path / "x.*")), "talk")
    write_json(tmp_path / "y.json", [])
    with pytest.raises(DataError, match=r"\*\.json means 2 files, .*x\.json the first: shards are \.tar or \.parquet"):
        read(SourceSpec(path=str(tmp_path / "*.json")), "talk")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("file/x.json", r"file/x\.json can't be opened: .*Not a directory"),
        ("file/x.tar", r"file/x\.tar can't be opened: .*Not a directory"),
        ("nowhere://x/*.tar", r"nowhere://x/\*\.tar can't be looked for: Protocol not known: nowhere"),
    ],
)
def test_what_can_not_be_reached_is_told_with_the_reason(tmp_path, path, said):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=said):
        open_rows(path if "://" in path else str(tmp_path / path))


@pytest.mark.parametrize("columns", ["rows", "questions", "preferences"])
def test_parquet_is_read_where_it_lies(tmp_path, shown, columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for row in sample_rows(0, 6):
        picture = {"bytes": shown[row["image"]], "path": row["image"]}
        answer = row["conversations"][1]
        if columns == "rows":
            rows.append({"id": row["id"], "images": [picture], "conversations": row["conversations"]})
        elif columns == "questions":
            rows.append({"image": picture, "question": "q", "answer": answer["value"]})
        else:
            rejected = [row["conversations"][0], {"from": "gpt", "value": "no"}]
            rows.append({"images": [picture], "chosen": row["conversations"], "rejected": rejected})
    key = "image" if columns == "questions" else "images"
    broken = {"bytes": b"broken", "path": None}
    rows[2][key] = broken if columns == "questions" else [broken]
    for number in range(2):
        pq.write_table(pa.Table.from_pylist(rows[3 * number :][:3]), tmp_path / f"x-{number}.parquet", row_group_size=2)
    source = read(SourceSpec(path=str(tmp_path / "x-*.parquet")), "talk")
    assert [bad.key.row for bad in source.bad] == [2] and source.bad[0].key.file.endswith("x-0.parquet#row 2")
    assert source.records.rows.tolist() == [0, 1, 3, 4, 5] and source.records.blocks.tolist() == [0, 0, 2, 2, 3]
    for record in source.records:
        assert record.answers == (f"answer {record.key.row}",)
        assert decode(record.images[0]).size == (4 + 4 * record.key.row, 4)
        assert len(content(record.images[0])) == 64


def stage_of(path: str, order: str, seed: int = 0) -> tuple[StageData, Order]:
    source = read(SourceSpec(path=path), "talk")
    data = StageData(
        [source],
        make_tokenizer(),
        placeholders=2,
        visual=[True] * 2,
        pictures=PictureSpec(),
        size=8,
        max_length=64,
        seed=seed,
    )
    return data, Order(len(data), 5, seed, "0", order, data.lengths, data.picture_counts, data.mixture, data.blocks)


@pytest.mark.parametrize("order", ["random", "shards"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_every_sample_and_none_twice_and_continue_anywhere(tmp_path, shown, order, world):
    for number in range(3):
        make_shard(str(tmp_path / f"x-{number}.tar"), sample_rows(4 * number, 4), shown)
    data, made = stage_of(str(tmp_path / "x-*.tar"), order)
    updates = made.updates_per_epoch
    epoch = [shares(made.update(number), world) for number in range(updates)]
    assert sorted(index for update in epoch for share in update for _, index in share) == list(range(12))
    again, other = stage_of(str(tmp_path / "x-*.tar"), order)  # as after a kill: nothing of before is known
    assert [shares(other.update(number), world) for number in (updates - 1, updates)] == [
        epoch[-1],
        shares(made.update(updates), world),
    ]
    at = made.update(1)[0]
    assert data[at].input_ids.equal(again[at].input_ids) and data[at].pictures.equal(again[at].pictures)
    assert data.check().bad == [] and data.known_lengths["talk"][:, 1].min() > 0


def test_order_of_shards_reads_each_from_front_to_back_and_depends_on_seed_and_epoch():
    blocks = np.repeat(np.arange(64), 500)
    count = len(blocks)
    made = [
        Order(count, count, seed, "0", "shards", mixture=[(20_000, 1.0), (count - 20_000, 1.0)], blocks=blocks)
        for seed in (0, 1)
    ]
    epochs = [np.array([index for _, index in made[seed].update(epoch)]) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(count))
        for rank in range(4):
            lanes = epoch[rank::16]
            steps = np.abs(np.diff(lanes))
            assert (steps < 256).mean() > 0.9  # but where one shard follows another
            assert len(np.unique(blocks[lanes])) <= 5
        assert len(np.unique(blocks[epoch[:64]])) == 16
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], epochs[2])


def test_a_store_is_asked_in_blocks_where_it_is_read_in_order(monkeypatch, tmp_path):
    monkeypatch.setattr(readers, "BLOCK", 100)
    name = f"memory://{tmp_path.name}/a.bin"
    data = bytes(range(250)) * 4
    with fsspec.open(name, "wb") as stream:
        stream.write(data)
    fetched = counted(monkeypatch, readers, "_fetched")
    opened = readers.Reader(name)
    assert b"".join(opened.read(at, 10) for at in range(0, 1000, 10)) == data
    assert len(fetched) == 20  # each block twice: once the first place, then the block
    assert opened.read(95, 10) == data[95:105] and opened.read(950, 400) == data[950:]


def test_blocks_of_scanning_have_no_bearing_on_backslashes_at_their_edges():
    text = b'["\\\\\\"],", "\\\\", 3]'
    expected = json.loads(text)
    for block in range(1, len(text) + 1):
        scan = list_rows((text[at : at + block] for at in range(0, len(text), block)), 0)
        assert scan.end == len(text) - 1 and len(np.concatenate(scan.bounds)) == len(expected)
    assert scanning.SPACE == b" \t\r\n"
