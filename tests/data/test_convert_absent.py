"""Boxes as captions, as polling questions and as preferences: what is there, and what is not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distilvlm.data import DataError, read
from distilvlm.data.convert import Converted, convert, naming
from distilvlm.data.convert.absent import Absences
from distilvlm.data.convert.boxes import Boxed
from distilvlm.evaluate.hallucination.synonyms import Synonyms
from distilvlm.recipe.schema import SourceSpec

from .real_files import real
from .small_data import make_pictures

NAMES = ("person", "dog", "cat", "umbrella", "scissors", "bus")


def rows_of(path: Path | None) -> list[dict[str, Any]]:
    assert path is not None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(row: dict[str, Any]) -> tuple[str, str]:
    question, answer = (turn["value"] for turn in row["conversations"])
    return question.removeprefix("<image>\n"), answer


def last(row: dict[str, Any], side: str) -> str:
    return row[side][-1]["value"]


def yolo(directory: Path, pictures: list[dict[str, float]], names: tuple[str, ...] = NAMES) -> Path:
    """Pictures with so many small boxes of a thing; the fraction of a number makes them larger."""
    make_pictures(directory / "images" / "train", len(pictures), side=40)
    labels = directory / "labels" / "train"
    labels.mkdir(parents=True, exist_ok=True)
    for number, things in enumerate(pictures):
        lines = [
            f"{names.index(name)} 0.5 0.5 {0.1 + count % 1} 0.1"
            for name, count in things.items()
            for _ in range(int(count))
        ]
        (labels / f"{number}.txt").write_text("\n".join(lines))
    (directory / "data.yaml").write_text(f"path: .\ntrain: images/train\nnames: {list(names)}\n")
    return directory / "data.yaml"


def made(directory: Path, pictures: list[dict[str, float]], **options: Any) -> Converted:
    return convert("yolo", yolo(directory, pictures), directory / "out.jsonl", **options)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"dog": 1}, "There is a dog."),
        ({"person": 2, "umbrella": 1}, "There are two people and an umbrella."),
        ({"umbrella": 1, "person": 3, "bus": 2}, "There is an umbrella, three people and two buses."),
        ({"scissors": 1}, "There is a pair of scissors."),
        ({"scissors": 2, "wine glass": 12}, "There are two pairs of scissors and twelve wine glasses."),
        ({"sheep": 13, "knife": 2}, "There are 13 sheep and two knives."),
        ({"Policeman": 2, "hot dog": 1}, "There are two Policemen and a hot dog."),
        ({"uniform": 1, "hour": 1}, "There is a uniform and a hour."),
        ({"battery": 2, "mongoose": 2, "bench": 2}, "There are two batteries, two mongooses and two benches."),
    ],
)
def test_things_are_named_in_english(counts, sentence):
    assert naming.sentence(counts) == sentence


def test_a_caption_names_what_is_there_the_largest_first(tmp_path):
    done = made(tmp_path, [{"dog": 1, "person": 2.5}, {"cat": 1, "umbrella": 1}, {}], task="caption")
    rows = rows_of(done.train)
    assert [said(row) for row in rows] == [
        ("Describe this picture.", "There are two people and a dog."),
        ("Describe this picture.", "There is a cat and an umbrella."),
    ]
    assert rows[0]["meta"] == {"task": "caption", "things": {"dog": 1, "person": 2}}
    assert done.left_out == {"pictures without objects": 1}
    other = made(tmp_path, [{"dog": 1}], task="caption", question="What do you see?")
    assert said(rows_of(other.train)[0])[0] == "What do you see?"


def test_voc_has_the_same_tasks(tmp_path):
    make_pictures(tmp_path / "JPEGImages", 1, side=20)
    boxes = "".join(
        f"<object><name>{name}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
        for name in ("dog", "cat")
    )
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "0.xml").write_text(f"<annotation><filename>0.png</filename>{boxes}</annotation>")
    done = convert("voc", tmp_path, tmp_path / "out.jsonl", task="caption")
    assert said(rows_of(done.train)[0])[1] == "There is a cat and a dog."
    pairs = convert("voc", tmp_path, tmp_path / "out.jsonl", task="pairs", rated=True)  # no name is absent
    assert [row["label"] for row in rows_of(pairs.train)] == [True, True, False, False]
    assert pairs.left_out == {"absent things to ask about: the data set has no further names": 2}


def test_polling_asks_about_as_many_absent_things_as_there_are(tmp_path):
    pictures = [{"dog": 2, "person": 1.5}, {"umbrella": 1}, {"cat": 1}, {"bus": 1, "scissors": 3}]
    done = made(tmp_path, pictures, task="presence")
    by_picture: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(done.train):
        by_picture.setdefault(row["image"], []).append(row)
    for things, rows in zip(pictures, by_picture.values(), strict=True):
        there = [row["meta"]["thing"] for row in rows if row["meta"]["there"]]
        assert set(there) == set(things) and len(rows) == 2 * len(things) == len({row["id"] for row in rows})
        for row in rows:
            meta = row["meta"]
            assert said(row)[1] == ("yes" if meta["there"] else "no") and meta["there"] == (meta["thing"] in things)
            assert meta["things"] == {name: int(count) for name, count in sorted(things.items())}
            assert (meta["task"], meta["how"]) == ("presence", "random")
    questions = [said(row)[0] for row in rows_of(done.train)]
    assert (
        "Is there an umbrella in the picture?" in questions
        and "Is there a pair of scissors in the picture?" in questions
    )
    asked = made(tmp_path, pictures, task="presence", question="Do you see {a} {thing}?")
    assert said(rows_of(asked.train)[0])[0] == "Do you see a person?"


def boxed(number: int, *things: str) -> Boxed:
    return Boxed("f", f"{number}.png", (10, 10), tuple((name, (0.0, 0.0, 1.0, 1.0)) for name in things))


PICTURES = [
    boxed(0, "person", "dog"),
    boxed(1, "person", "dog", "cat"),
    boxed(2, "person", "bus"),
    boxed(3, "person", "umbrella", "umbrella", "umbrella"),
    boxed(4, "bus", "umbrella"),
    boxed(5, "dog"),
    boxed(6, "umbrella"),
]


def test_popular_things_are_those_that_most_pictures_show():
    # Pictures, not boxes: person 4, umbrella 3, dog 3, bus 2, cat 1, scissors 0.
    absences = Absences(PICTURES, NAMES, "popular")
    assert absences.of(PICTURES[4], 9) == ["person", "dog", "cat", "scissors"]
    assert absences.of(PICTURES[0], 2) == ["umbrella", "bus"]


def test_adversarial_things_are_those_seen_with_what_is_there():
    absences = Absences(PICTURES, NAMES, "adversarial")
    # With a bus: a person or an umbrella, both once, and persons are more common.
    assert absences.of(boxed(9, "bus"), 2) == ["person", "umbrella"]
    # Things take turns: the dog's is the person, the umbrella's the person, too (taken), hence the bus.
    assert absences.of(boxed(9, "dog", "umbrella"), 2) == ["person", "bus"]
    # Where nothing was ever seen with it, others follow; what no picture shows comes last.
    lonely = absences.of(boxed(9, "scissors"), 9)
    assert sorted(lonely) == sorted(set(NAMES) - {"scissors"})
    assert absences.of(boxed(9, "person", "dog", "cat"), 9)[-1] == "scissors"


@pytest.mark.parametrize("how", ["random", "popular", "adversarial"])
def test_absent_things_are_a_function_of_the_data(how):
    absences = Absences(PICTURES, NAMES, how)
    turned = Absences(PICTURES[::-1], NAMES[::-1], how)
    for picture in PICTURES:
        found = absences.of(picture, 9)
        assert sorted([*found, *picture.counts]) == sorted(NAMES)  # each once, none that is there
        assert found == turned.of(picture, 9) and found[:2] == absences.of(picture, 2)
        assert found[-1] == "scissors"  # nobody has to look to know that it is not there
    if how == "random":
        assert len({tuple(absences.of(boxed(number, "dog"), 4)) for number in range(9)}) > 3


def test_pairs_set_the_true_against_the_false(tmp_path):
    pictures = [{"dog": 2, "person": 1.5}, {"umbrella": 1}, {"cat": 1, "bus": 1, "dog": 1, "person": 1, "umbrella": 1}]
    done = made(tmp_path, pictures, task="pairs")
    rows = rows_of(done.train)
    assert done.preferences == "pairs" and len(rows) == (2 + 4) + (2 + 2) + (2 + 5 + 1)
    for row in rows:
        meta = row["meta"]
        things = pictures[int(Path(row["image"]).stem)]
        assert (
            meta["task"] == "pairs"
            and set(meta["things"]) == set(things)
            and row["chosen"][:-1] == row["rejected"][:-1]
        )
        if meta["about"] == "presence":
            right, wrong = ("yes", "no") if meta["there"] else ("no", "yes")
            assert (last(row, "chosen"), last(row, "rejected")) == (right, wrong)
            assert meta["there"] == (meta["thing"] in things)
        else:
            named = [Synonyms.of_names(NAMES).mentions(last(row, side)) for side in ("chosen", "rejected")]
            true, false = ([mention.object for mention in one] for one in named)
            assert set(true) == set(things)
            assert set(false) - set(true) == set(meta["absent"]) and meta["absent"]
            assert (len(false) == len(true)) == (meta["changed"] == "replaced")
            assert (set(true) <= set(false)) == (meta["changed"] == "extended")
    source = read(SourceSpec(path=str(done.train), images=str(done.images)), "x")
    assert (source.bad, source.preferences, len(source.records)) == ([], "pairs", len(rows))
    captions = convert("preference", done.train, tmp_path / "c.jsonl", images=done.images, where={"about": "caption"})
    assert rows_of(captions.train) == [row for row in rows if row["meta"]["about"] == "caption"]
    rated = made(tmp_path, pictures, task="pairs", rated=True)
    assert rated.rows == 2 * len(rows) and rated.preferences == "rated"


def test_a_long_caption_is_wrong_in_more_than_one_thing(tmp_path):
    names = tuple(f"thing{number}" for number in range(20))
    source = yolo(tmp_path, [{name: 1.0 for name in names[:6]}], names)
    rows = rows_of(convert("yolo", source, tmp_path / "out.jsonl", task="pairs").train)
    assert [len(row["meta"]["absent"]) for row in rows if row["meta"]["about"] == "caption"] == [2, 2]
    shared = [set(row["meta"]["absent"]) for row in rows if row["meta"]["about"] == "caption"]
    assert not shared[0] & shared[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "poll"}, "task: 'poll' is none of detect, grounding, list, count, caption, presence, pairs"),
        ({"task": "detect", "absent": -1}, "absent must not be negative, decimals from 1 to 6"),
        ({"task": "detect", "decimals": 0}, "absent must not be negative, decimals from 1 to 6"),
        ({"task": "presence", "negatives": "hard"}, "negatives: 'hard' is none of random, popular, adversarial"),
        ({"task": "detect", "negatives": "popular"}, "negatives: task detect has no such option"),
        ({"task": "presence", "absent": 2}, "absent: task presence has no such option"),
        ({"task": "presence", "rated": True}, "rated: task presence has no such option"),
        ({"task": "pairs", "question": "Is it?"}, "question: task pairs has no such option"),
        ({"task": "pairs", "one_per_picture": True}, "can't be joined"),
    ],
)
def test_options_that_a_task_does_not_have_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        made(tmp_path, [{"dog": 1}, {"cat": 1}], **options)


def test_a_pictures_polling_questions_may_be_joined(tmp_path):
    done = made(tmp_path, [{"dog": 1, "cat": 1}, {"bus": 1}], task="presence", one_per_picture=True)
    assert [len(row["conversations"]) for row in rows_of(done.train)] == [8, 4]
    assert sorted(turn["there"] for turn in rows_of(done.train)[1]["meta"]["turns"]) == [False, True]


def test_several_splits_are_one_source(tmp_path):
    source = yolo(tmp_path, [{"dog": 1}, {"cat": 1}])
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").rename(tmp_path / kind / "one")
        (tmp_path / kind / "two").mkdir()
        for file in (tmp_path / kind / "one").glob("1.*"):
            file.rename(tmp_path / kind / "two" / file.name)
    source.write_text(source.read_text().replace("train: images/train", "train: images/one\nval: images/two"))
    done = convert("yolo", source, tmp_path / "out.jsonl", split="train, val", task="caption")
    assert [row["image"] for row in rows_of(done.train)] == ["images/one/0.png", "images/two/1.png"]
    with pytest.raises(DataError, match="no split 'test'"):
        convert("yolo", source, tmp_path / "out.jsonl", split="train,test")


def test_no_picture_serves_both_pairs_and_polling_questions(tmp_path):
    source = yolo(tmp_path / "one", [{NAMES[number % 5]: 1, NAMES[number % 3]: 1} for number in range(24)])
    for number in range(24):  # no two pictures alike
        file = tmp_path / "one" / "images" / "train" / f"{number}.png"
        Image.new("RGB", (40, 40), (10 * number, 0, 0)).save(file)
    settings: dict[str, Any] = {"hold_out": 0.4, "seed": 3}
    pairs = convert("yolo", source, tmp_path / "pairs.jsonl", task="pairs", **settings)
    polls = [
        convert("yolo", source, tmp_path / f"{how}.jsonl", task="presence", negatives=how, **settings)
        for how in ("random", "popular", "adversarial")
    ]
    captions = convert("yolo", source, tmp_path / "captions.jsonl", task="caption", **settings)
    trained = {row["image"] for row in rows_of(pairs.train)}
    held = {row["image"] for row in rows_of(pairs.test)}
    assert trained and held and not trained & held and len(trained | held) == 24
    for done in (*polls, captions):
        assert {row["image"] for row in rows_of(done.train)} == trained
        assert {row["image"] for row in rows_of(done.test)} == held
    positives = [[row["id"] for row in rows_of(done.test) if row["meta"]["there"]] for done in polls]
    assert positives[0] == positives[1] == positives[2]
    negatives = {tuple(row["id"] for row in rows_of(done.test) if not row["meta"]["there"]) for done in polls}
    assert len(negatives) == 3


def test_coco128_is_told_whole_and_true(tmp_path):
    source = real("coco128") / "config.yaml"
    settings: dict[str, Any] = {"split": "train,val"}
    listed = convert("yolo", source, tmp_path / "list.jsonl", task="list", **settings)
    things = {row["image"]: row["meta"]["things"] for row in rows_of(listed.train)}
    names = Synonyms.of_names({name for there in things.values() for name in there})
    kinds = sum(len(there) for there in things.values())
    assert (len(things), kinds, sum(sum(there.values()) for there in things.values())) == (254, 735, 1827)

    captions = convert("yolo", source, tmp_path / "captions.jsonl", task="caption", **settings)
    assert {row["image"]: row["meta"]["things"] for row in rows_of(captions.train)} == things
    for row in rows_of(captions.train):
        assert {mention.object for mention in names.mentions(said(row)[1])} == set(things[row["image"]])

    for how in ("random", "popular", "adversarial"):
        polls = convert("yolo", source, tmp_path / "polls.jsonl", task="presence", negatives=how, **settings)
        rows = rows_of(polls.train)
        assert Counter(said(row)[1] for row in rows) == {"yes": kinds, "no": kinds}
        assert all((row["meta"]["thing"] in things[row["image"]]) == row["meta"]["there"] for row in rows)

    pairs = convert("yolo", source, tmp_path / "pairs.jsonl", task="pairs", hold_out=0.3, **settings)
    polls = convert("yolo", source, tmp_path / "polls.jsonl", task="presence", hold_out=0.3, **settings)
    assert (pairs.rows, pairs.pictures, polls.rows) == (2 * 254 + 2 * kinds, 254, 2 * kinds)
    assert not {row["image"] for row in rows_of(pairs.train)} & {row["image"] for row in rows_of(polls.test)}
    for path in (pairs.train, pairs.test):
        read_back = read(SourceSpec(path=str(path), images=str(pairs.images)), "x")
        assert read_back.bad == [] and read_back.preferences == "pairs"


def test_a_folder_of_a_class_shows_that_thing_and_no_other(tmp_path: Path) -> None:
    for name in ("hat", "shirt", "shoe"):
        make_pictures(tmp_path / "train" / name, 4)
    polled = rows_of(convert("folders", tmp_path / "train", tmp_path / "polled.jsonl", task="presence").train)
    assert len(polled) == 2 * 12
    for row in polled:
        assert said(row)[1] == ("yes" if row["meta"]["thing"] == row["image"].split("/")[0] else "no")
    pairs = convert("folders", tmp_path / "train", tmp_path / "pairs.jsonl", task="pairs", where={"about": "presence"})
    for row in rows_of(pairs.train):
        assert {last(row, "chosen"), last(row, "rejected")} == {"yes", "no"}
        assert (last(row, "chosen") == "yes") == row["meta"]["there"]
    with pytest.raises(DataError, match="answer"):
        convert("folders", tmp_path / "train", tmp_path / "x.jsonl", task="presence", answer="a {label}")


def test_the_order_of_polled_things_does_not_tell_which_are_there(tmp_path: Path) -> None:
    for name in ("hat", "shoe"):
        make_pictures(tmp_path / "train" / name, 20)
    made = convert("folders", tmp_path / "train", tmp_path / "x.jsonl", task="presence", one_per_picture=True)
    first = [row["conversations"][1]["value"] for row in rows_of(made.train)]
    assert len(first) == 40 and 8 < first.count("yes") < 32
