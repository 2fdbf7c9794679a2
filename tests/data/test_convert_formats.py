"""Each format on a small data set of its own, good rows and faults."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distilvlm.data import DataError
from distilvlm.data.boxes import written
from distilvlm.data.convert import convert
from distilvlm.data.convert.parquet import read

from .small_data import make_pictures


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def talk(path: Path) -> list[tuple[str, ...]]:
    return [tuple(turn["value"] for turn in row["conversations"]) for row in rows_of(path)]


def test_folders_answer_with_their_name(tmp_path):
    for name in ("t-shirt", "long_dress"):
        make_pictures(tmp_path / "raw" / name, 1)
        make_pictures(tmp_path / "raw" / name / "more", 1)
    (tmp_path / "raw" / "t-shirt" / "notes.txt").write_text("x")
    done = convert(
        "folders", tmp_path / "raw", tmp_path / "out.jsonl", question="Which?", answer="a {label}", pretty=True
    )
    assert talk(done.train) == [("<image>\nWhich?", "a long dress")] * 2 + [("<image>\nWhich?", "a t shirt")] * 2
    assert rows_of(done.train)[3]["image"] == "t-shirt/more/0.png"
    assert rows_of(done.train)[3]["meta"] == {"class": "t-shirt"}
    assert done.left_out == {"files that are no pictures (.txt)": 1}
    caption = convert("folders", tmp_path / "raw", tmp_path / "out.jsonl", question="", images=tmp_path)
    assert talk(caption.train)[0] == ("<image>", "long_dress")
    assert rows_of(caption.train)[0]["image"] == "raw/long_dress/0.png"
    (tmp_path / "raw" / "hat").mkdir()
    with pytest.raises(DataError, match="hat, field 'class': no picture in this class"):
        convert("folders", tmp_path / "raw", tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="name the one that holds a folder per class"):
        convert("folders", tmp_path / "nowhere", tmp_path / "out.jsonl")
    (tmp_path / "raw" / "hat").rmdir()
    with pytest.raises(DataError, match=rf"no picture lies directly .*: convert {tmp_path / 'raw'} by itself"):
        convert("folders", tmp_path, tmp_path / "out.jsonl")


def yolo(tmp_path: Path, labels: dict[int, str]) -> Path:
    make_pictures(tmp_path / "images" / "train", 3, side=20)  # 20 x 20, 24 x 20, 28 x 20
    (tmp_path / "labels" / "train").mkdir(parents=True)
    for number, text in labels.items():
        (tmp_path / "labels" / "train" / f"{number}.txt").write_text(text)
    path = tmp_path / "data.yaml"
    path.write_text("path: .\ntrain: images/train\nnames: [cat, dog]\n")
    return path


def test_yolo_boxes_are_of_the_padded_square(tmp_path):
    # 28 x 20 pixels: 4 rows of padding above and below.
    source = yolo(tmp_path, {2: "1 0.5 0.5 0.5 1\n0 0.75 0.25 0.5 0.5\n1 0.125 0.5 0.25 0.5\n", 9: ""})
    done = convert("yolo", source, tmp_path / "out.jsonl")
    assert talk(done.train) == [
        ("<image>\nLocate every dog.", "[0.00, 0.32, 0.25, 0.68]; [0.25, 0.14, 0.75, 0.86]"),
        ("<image>\nLocate every cat.", "[0.50, 0.14, 1.00, 0.50]"),
    ]
    row = rows_of(done.train)[0]
    assert (row["image"], row["id"]) == ("images/train/2.png", "images/train/2.png:dog")
    assert row["meta"]["boxes"] == [[0, 5, 7, 15], [7, 0, 21, 20]] and row["meta"]["size"] == [28, 20]
    assert done.left_out == {"pictures without a label file": 2, "label files without a picture": 1}
    count = convert("yolo", source, tmp_path / "out.jsonl", task="count", absent=2, question="How many: {thing}?")
    assert ("<image>\nHow many: dog?", "2") in talk(count.train)
    answers = {row["id"]: row["conversations"][1]["value"] for row in rows_of(count.train)}
    assert answers == {
        **{f"images/train/{n}.png:{thing}": "0" for n in (0, 1) for thing in ("cat", "dog")},
        "images/train/2.png:dog": "2",
        "images/train/2.png:cat": "1",
    }
    listed = convert("yolo", source, tmp_path / "out.jsonl", task="list", absent=1)
    assert [answer for _, answer in talk(listed.train)] == ["none", "none", "cat, dog"]


def test_boxes_never_vanish_by_rounding():
    assert written((0, 0, 100, 50), (100, 50)) == "[0.00, 0.25, 1.00, 0.75]"
    assert written((50.1, 10.1, 50.3, 40), (100, 100)) == "[0.50, 0.10, 0.51, 0.40]"
    assert written((50.1, 10.1, 50.3, 40), (100, 100), decimals=3) == "[0.501, 0.101, 0.503, 0.400]"


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        ("0 0.5 0.5 1.5 0.5", "box", "sticks out of the picture of 20 x 20 pixels"),
        ("0 0.5 0.5 0 0.5", "box", "is empty or inverted"),
        ("0 0.5 0.5 nan 0.5", "box", "is no box"),
        ("2 0.5 0.5 0.5 0.5", "class", "2 is none of the 2 in `names`"),
        ("0 0.5 0.5 0.5", "line", "3 numbers behind the class; 4 are expected"),
        ("cat 0.5 0.5 0.5 0.5", "line", "numbers are expected"),
        ("0.5 0.5 0.5 0.5 0.5", "line", "is a whole number"),
    ],
)
def test_a_yolo_fault_takes_its_picture_with_it(tmp_path, line, field, reason):
    source = yolo(tmp_path, {0: f"0 0.5 0.5 0.5 0.5\n{line}\n", 1: "0 0.5 0.5 0.5 0.5\n"})
    done = convert("yolo", source, tmp_path / "out.jsonl", on_bad_row="quarantine")
    assert [row["image"] for row in rows_of(done.train)] == ["images/train/1.png"]
    (bad,) = done.bad
    assert (bad.file, bad.row, bad.field) == (str(tmp_path / "labels/train/0.txt"), 1, field)
    assert reason in bad.reason


def test_a_turned_photograph_is_measured_upright(tmp_path):
    source = yolo(tmp_path, {2: "0 0.5 0.25 1 0.5\n"})
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter: 20 wide, 28 high
    Image.open(tmp_path / "images/train/2.png").save(tmp_path / "images/train/2.jpg", exif=exif)
    (tmp_path / "images/train/2.png").unlink()
    done = convert("yolo", source, tmp_path / "out.jsonl")
    assert rows_of(done.train)[0]["meta"]["size"] == [20, 28]
    assert talk(done.train) == [("<image>\nLocate every cat.", "[0.14, 0.00, 0.86, 0.50]")]


def test_yolo_lists_of_pictures_start_where_ultralytics_has_them(tmp_path):
    source = yolo(tmp_path, {0: "0 0.5 0.5 1 1\n", 1: "1 0.5 0.5 1 1\n"})
    (tmp_path / "images" / "list.txt").write_text("images/train/1.png\n./train/0.png\n")
    source.write_text(source.read_text().replace("train: images/train", "train: [images/list.txt]"))
    done = convert("yolo", source, tmp_path / "out.jsonl")
    assert [row["id"] for row in rows_of(done.train)] == ["images/train/1.png:dog", "images/train/0.png:cat"]


def test_yolo_polygons_become_their_boxes_and_splits_are_named(tmp_path):
    source = yolo(tmp_path, {0: "0 0.1 0.2 0.6 0.1 0.4 0.9\n"})
    done = convert("yolo", source, tmp_path / "out.jsonl")
    assert talk(done.train) == [("<image>\nLocate every cat.", "[0.10, 0.10, 0.60, 0.90]")]
    with pytest.raises(DataError, match="no split 'val'; there is train"):
        convert("yolo", source, tmp_path / "out.jsonl", split="val")
    with pytest.raises(DataError, match=r"name the data set's YAML file \(there is data\.yaml\)"):
        convert("yolo", tmp_path, tmp_path / "out.jsonl")


def voc(tmp_path: Path, objects: str, size: tuple[int, int] = (24, 20), filename: str = "1.png") -> Path:
    """One XML file, for the picture 1.png of 24 x 20 pixels."""
    make_pictures(tmp_path / "JPEGImages", 2, side=20)
    (tmp_path / "Annotations").mkdir()
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    text = f"<annotation><filename>{filename}</filename>{sides}{objects}</annotation>"
    (tmp_path / "Annotations" / "1.xml").write_text(text)
    return tmp_path


def voc_object(name: str, *corners: int, difficult: int = 0) -> str:
    tags = "".join(f"<{tag}>{at}</{tag}>" for tag, at in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{tags}</bndbox></object>"


def test_voc_counts_pixels_from_one_and_includes_the_last(tmp_path):
    source = voc(tmp_path, voc_object("cell", 1, 1, 24, 20) + voc_object("cell", 13, 1, 18, 10, difficult=1))
    done = convert("voc", source, tmp_path / "out.jsonl", decimals=3)
    assert talk(done.train) == [
        ("<image>\nLocate every cell.", "[0.000, 0.083, 1.000, 0.917]; [0.500, 0.083, 0.750, 0.500]")
    ]
    assert done.left_out == {"pictures without an XML file": 1}
    easy = convert("voc", source, tmp_path / "out.jsonl", task="count", difficult="leave")
    assert talk(easy.train) == [("<image>\nCount every cell.", "1")]
    assert easy.left_out["objects marked difficult"] == 1


def test_voc_from_zero_must_be_said(tmp_path):
    source = voc(tmp_path, voc_object("cell", 0, 0, 12, 20))
    with pytest.raises(DataError, match=r"row 0, field 'bndbox': cell begins at pixel 0.*set origin to 0"):
        convert("voc", source, tmp_path / "out.jsonl")
    done = convert("voc", source, tmp_path / "out.jsonl", origin=0)
    assert rows_of(done.train)[0]["meta"]["boxes"] == [[0, 0, 12, 20]]


@pytest.mark.parametrize(
    ("objects", "changes", "field", "reason"),
    [
        (voc_object("cell", 5, 5, 5, 9), {}, "bndbox", "is empty or inverted"),
        (voc_object("cell", 5, 5, 25, 9), {}, "box", "sticks out of the picture of 24 x 20"),
        (voc_object("", 5, 5, 9, 9), {}, "name", "is empty"),
        ("<object><name>cell</name></object>", {}, "bndbox", "must be numbers"),
        ("", {"size": (48, 40)}, "size", "says 48 x 40, but 1.png has 24 x 20 pixels: was it resized"),
        ("<object>", {}, "xml", "can't be parsed"),
    ],
)
def test_voc_faults_are_named(tmp_path, objects, changes, field, reason):
    source = voc(tmp_path, objects, **changes)
    with pytest.raises(DataError) as error:
        convert("voc", source, tmp_path / "out.jsonl")
    assert f"{tmp_path / 'Annotations' / '1.xml'}" in str(error.value)
    assert f"field '{field}': " in str(error.value) and reason in str(error.value)


def test_voc_takes_the_picture_of_the_same_name_and_splits(tmp_path):
    source = voc(tmp_path, voc_object("cell", 5, 5, 9, 9), filename="elsewhere.jpg")
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("1\n")
    done = convert("voc", source, tmp_path / "out.jsonl", split="train")
    assert [row["image"] for row in rows_of(done.train)] == ["1.png"]
    with pytest.raises(DataError, match=r"no split 'val': .*there is train"):
        convert("voc", source, tmp_path / "out.jsonl", split="val")


def test_vqa_tables_and_templates(tmp_path):
    make_pictures(tmp_path, 2)
    with (tmp_path / "q.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerows([["file_name", "query", "label"], ["0.png", "größer, oder?", "ja"], ["1.png", "was?", "7"]])
    short = "{question}\nAnswer with one word."
    done = convert("vqa", tmp_path / "q.csv", tmp_path / "out.jsonl", question=short)
    assert talk(done.train)[0] == ("<image>\ngrößer, oder?\nAnswer with one word.", "ja")
    by_id = {"a1": {"imageId": "0", "question": "q", "answer": "x"}}
    (tmp_path / "gqa.json").write_text(json.dumps(by_id))
    gqa = convert("vqa", tmp_path / "gqa.json", tmp_path / "out.jsonl", picture="{imageId}.png")
    assert rows_of(gqa.train)[0]["id"] == "a1" and rows_of(gqa.train)[0]["image"] == "0.png"
    several = [{"image": "0.png", "question": "q", "answers": [{"answer": "b"}, {"answer": "a"}, {"answer": "a"}]}]
    (tmp_path / "s.jsonl").write_text(json.dumps(several[0]))
    assert talk(convert("vqa", tmp_path / "s.jsonl", tmp_path / "out.jsonl").train) == [("<image>\nq", "a")]
    with pytest.raises(DataError, match=r"no field 'Q'; it has answers, image, question\. Set question_field"):
        convert("vqa", tmp_path / "s.jsonl", tmp_path / "out.jsonl", question_field="Q")


def test_vqav2_joins_its_two_files(tmp_path):
    make_pictures(tmp_path, 1)
    (tmp_path / "0.png").rename(tmp_path / "COCO_train2014_000000000042.jpg")
    questions = {"data_subtype": "train2014", "questions": [{"question_id": 7, "image_id": 42, "question": "is it?"}]}
    answers = {
        "annotations": [
            {
                "question_id": 7,
                "image_id": 42,
                "answer_type": "yes/no",
                "multiple_choice_answer": "yes",
                "answers": [{"answer": "no"}],
            }
        ]
    }
    q, a = tmp_path / "q.json", tmp_path / "a.json"
    q.write_text(json.dumps(questions, indent=1))
    a.write_text(json.dumps(answers))
    done = convert("vqa", q, tmp_path / "out.jsonl", annotations=a, where={"answer_type": "yes/no"})
    assert talk(done.train) == [("<image>\nis it?", "yes")]
    a.write_text(json.dumps({"annotations": [{"question_id": 8, "multiple_choice_answer": "x"}]}))
    with pytest.raises(DataError, match=r"1 answers have no question in .*question_id 8"):
        convert("vqa", q, tmp_path / "out.jsonl", annotations=a)


def test_conversations_are_filtered_and_brought_into_one_form(tmp_path):
    make_pictures(tmp_path, 2)
    parts = [{"type": "image_url", "image_url": {"url": "1.png"}}, {"type": "text", "text": "q1"}]
    rows = [
        {
            "image": "0.png",
            "conversations": [{"from": "human", "value": "q0\n<image>"}, {"from": "gpt", "value": "a0"}],
        },
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a1"}]},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows[:1]))
    (tmp_path / "openai.json").write_text(json.dumps(rows[1:]))
    llava = convert("conversations", tmp_path / "llava.json", tmp_path / "out.jsonl")
    assert talk(llava.train) == [("q0\n<image>", "a0")]
    openai = convert("conversations", tmp_path / "openai.json", tmp_path / "out.jsonl")
    assert talk(openai.train) == [("<image>\nq1", "a1")] and rows_of(openai.train)[0]["image"] == "1.png"
    again = convert("conversations", openai.train, tmp_path / "again.jsonl")
    assert talk(again.train) == talk(openai.train)
    rows[1]["messages"][0]["content"] = [{"type": "image"}, parts[1]]
    (tmp_path / "openai.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(DataError, match="row 0, field 'messages': shows 1 pictures, but 'image' holds none"):
        convert("conversations", tmp_path / "openai.json", tmp_path / "out.jsonl")


def picture(colour: int, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(stream, format)
    return stream.getvalue()


def parquet(path: Path, rows: list[dict[str, Any]], features: dict | None = None) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist(rows)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


def test_parquet_pictures_are_written_once_and_unchanged(tmp_path):
    red, blue = picture(200), picture(10, "WEBP")
    rows = [
        {"id": "a", "image": {"bytes": red, "path": "x.png"}, "question": "q0", "answer": "a0", "kind": 1},
        {"id": "b", "image": {"bytes": blue, "path": None}, "question": "q1", "answer": "a1", "kind": 2},
        {"id": "c", "image": {"bytes": red, "path": "y.png"}, "question": "q2", "answer": "a2", "kind": 2},
    ]
    source = parquet(tmp_path / "data.parquet", rows)
    done = convert("parquet", source, tmp_path / "out.jsonl", where={"kind": "2"})
    made = rows_of(done.train)
    assert [(row["id"], row["conversations"][1]["value"], row["meta"]) for row in made] == [
        ("b", "a1", {"kind": 2}),
        ("c", "a2", {"kind": 2}),
    ]
    assert done.images == tmp_path / "pictures" and len(list(done.images.iterdir())) == 2
    assert [(done.images / row["image"]).read_bytes() for row in made] == [blue, red]
    assert [Path(row["image"]).suffix for row in made] == [".webp", ".png"]
    joined = convert("parquet", source, tmp_path / "out.jsonl", images=tmp_path / "p", one_per_picture=True)
    assert [len(row["conversations"]) for row in rows_of(joined.train)] == [4, 2]


def test_parquet_finds_conversations_labels_and_captions(tmp_path):
    red, blue = picture(200, "JPEG"), picture(10)
    shapes: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
        (
            {"image": red, "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]},
            {},
            ("<image>\nq", "a"),
        ),
        ({"images": [red, blue], "texts": [{"user": "q", "assistant": "a"}]}, {}, ("<image>\n<image>\nq", "a")),
        (
            {
                "images": [{"bytes": red, "path": None}],
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
                ],
            },
            {},
            ("<image>\nq", "a"),
        ),
        ({"img": red, "caption": "two words"}, {"question": ""}, ("<image>", "two words")),
        ({"image": red, "label": 1}, {"question": "What?", "answer": "a {answer}"}, ("<image>\nWhat?", "a dog")),
    ]
    for number, (row, options, expected) in enumerate(shapes):
        features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}} if "label" in row else None
        source = parquet(tmp_path / f"{number}.parquet", [row], features)
        done = convert("parquet", source, tmp_path / "out.jsonl", **options)
        assert talk(done.train) == [expected]
    assert rows_of(done.train)[0]["image"].endswith(".jpg")
    with pytest.raises(
        DataError,
        match=r'no column for the question .*; it has image, label\. Set question_field or give .*question="\.\.\."',
    ):
        convert("parquet", tmp_path / "4.parquet", tmp_path / "out.jsonl")


def test_parquet_faults_and_splits(tmp_path):
    rows = [
        {"image": b"nonsense", "caption": "x"},
        {"image": picture(3), "caption": ""},
        {"image": picture(3), "caption": "red"},
    ]
    bad = parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows[2:])
    with pytest.raises(DataError, match="holds the splits test, train: choose one"):
        convert("parquet", tmp_path / "data", tmp_path / "out.jsonl", question="")
    assert convert("parquet", tmp_path / "data", tmp_path / "out.jsonl", question="", split="test").rows == 1
    done = convert("parquet", bad, tmp_path / "out.jsonl", question="", on_bad_row="quarantine")
    assert [(fault.row, fault.field) for fault in done.bad] == [(0, "image"), (1, "caption")]
    assert "its 8 bytes are no picture" in done.bad[0].reason
    bad.write_bytes(bad.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet can't be read: .*is it whole"):
        convert("parquet", bad, tmp_path / "out.jsonl", question="")
    with pytest.raises(DataError, match="no parquet file at"):
        convert("parquet", tmp_path / "*.parq", tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=r"data has no file of split 'val': test-00000-of-00001\.parquet, train-"):
        convert("parquet", tmp_path / "data", tmp_path / "out.jsonl", split="val")
    with pytest.raises(DataError, match=r"data: say where embedded pictures go \(images\)"):
        read(tmp_path / "data", split="test", question="")


def test_a_saved_data_set_is_read_without_its_library(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(
        [{"image": {"bytes": picture(n), "path": None}, "question": f"q{n}", "answer": "a"} for n in range(3)]
    )
    for split, count in (("train", 3), ("test", 1)):
        directory = tmp_path / "saved" / split
        directory.mkdir(parents=True)
        names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        for name, part in zip(names, (table.slice(0, 1), table.slice(1, count - 1)), strict=True):
            with pa.OSFile(str(directory / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(part)
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (directory / "state.json").write_text(json.dumps(state))
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match="holds the splits train, test: choose one"):
        convert("datasets", tmp_path / "saved", tmp_path / "out.jsonl")
    done = convert("datasets", tmp_path / "saved", tmp_path / "out.jsonl", split="train")
    assert talk(done.train) == [(f"<image>\nq{n}", "a") for n in range(3)] and done.pictures == 3
    alone = convert("datasets", tmp_path / "saved" / "test", tmp_path / "out.jsonl")
    assert alone.rows == 1
    with pytest.raises(DataError, match=r"state\.json: a directory written by Dataset\.save_to_disk is expected"):
        convert("datasets", tmp_path, tmp_path / "out.jsonl")


def test_what_the_datasets_library_saves_is_read(tmp_path):
    library = pytest.importorskip("datasets")
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["cat", "dog"])})
    made = library.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 2, "label": [1, 0]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "made.parquet")
    for format, source in (("datasets", tmp_path / "saved"), ("parquet", tmp_path / "made.parquet")):
        done = convert(format, source, tmp_path / "out.jsonl", question="What?")
        assert talk(done.train) == [("<image>\nWhat?", "dog"), ("<image>\nWhat?", "cat")] and done.pictures == 1


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'distilvlm\[data\]'"):
        convert("parquet", tmp_path / "x.parquet", tmp_path / "out.jsonl")
