"""Multiple choice: ScienceQA, MMBench's circles, MMMU; how answers are read, and the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilvlm.data.problems import DataError
from distilvlm.data.records import PICTURE
from distilvlm.evaluate.suites import SUITES
from distilvlm.evaluate.suites.choices import by_letter, by_letter_or_text, last_named
from distilvlm.evaluate.suites.mmmu import open_right, read_open, values

from .small_data import figures, mmbench, picture, put

OPTIONS = {"A": "a red dog", "B": "a cat", "C": "two cats"}


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ("B", "B"),
        ("B. a cat", "B"),
        ("C\nbecause", "C"),
        ("The answer is C.", "C"),
        ("I think The answer is A", "A"),
        ("B.", None),  # their rule wants something behind the full stop
        ("b", None),
        ("D", None),  # there is no such option
        ("", None),
        ("a cat", None),
    ],
)
def test_scienceqas_rule(said: str, chosen: str | None) -> None:
    assert by_letter(said, OPTIONS) == chosen


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("The answer is B.", "B"),
        ("A", "A"),
        ("A red dog runs here", "A"),  # that A is an article, but the text is an option's
        ("A big dog runs here", None),
        ("A or B", None),
        ("It shows two cats", "C"),
        ("a cat, or two cats", None),
        ("Z", None),
        ("", None),
    ],
)
def test_mmbenchs_rule(said: str, chosen: str | None) -> None:
    assert by_letter_or_text(said, OPTIONS) == chosen


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ("B", "B"),
        ("(A) and then (C).", "C"),
        ("(A), not B or C", "A"),  # brackets come before all else
        ("not A but B", "B"),
        ("In this picture I see a cat", "B"),
        ("I see a red dog and then a cat there", "B"),
        ("a cat", None),  # texts are only looked for in longer answers
        ("", None),
    ],
)
def test_mmmus_rule(said: str, chosen: str | None) -> None:
    assert last_named(said, OPTIONS) == chosen


@pytest.mark.parametrize(
    ("said", "true", "right"),
    [
        ("The answer is 3.14159", ["3.14"], True),  # numbers are rounded to two places
        ("so x = 1,000", ["1000"], True),
        ("2e3", ["2000"], True),
        ("12", ["2"], False),
        ("-4", ["4"], False),
        ("The final result is Paris.", ["paris"], True),
        ("It is in the cat", ["a"], False),  # a single letter is none within a word
        ("x is a", ["a"], True),  # alone, it is
        ("1/2", ["0.5", "1/2"], True),
        ("", ["5"], False),
    ],
)
def test_mmmus_open_questions(said: str, true: list[str], right: bool) -> None:
    assert open_right(said, true) is right


def test_the_shortest_piece_behind_a_leading_word_counts() -> None:
    assert read_open("So the area is 5\nThus y = 7") == ["5", 5.0, "7", 7.0][1::2]
    assert values("A") == [" a", "a "] and values("1,234.567") == [1234.57]


@pytest.fixture
def science(tmp_path: Path) -> Path:
    common = {"lecture": "", "solution": "", "task": "closed choice", "split": "test"}
    problems = {
        "7": {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "Look.", "image": "image.png",
              "grade": "grade4", "subject": "natural science", **common},
        "8": {"question": "Who?", "choices": ["p", "q", "r", "s", "t"], "answer": 4, "hint": "", "image": None,
              "grade": "grade11", "subject": "social science", **common},
        "9": {"question": "unused", "choices": ["x"], "answer": 0, "hint": "", "image": None, "grade": "grade1",
              "subject": "x", **common},
    }  # fmt: skip
    put(tmp_path / "problems.json", problems)
    put(tmp_path / "pid_splits.json", {"train": ["9"], "test": ["7", "8"]})
    put(tmp_path / "images" / "test" / "7" / "image.png", picture())
    return tmp_path


def test_scienceqa_from_its_files(science: Path) -> None:
    opened = SUITES["scienceqa"].opened(science)
    first, second = opened.asked.questions
    letter = "Answer with the option's letter from the given choices directly."
    assert first.text == f"Context: Look.\nWhich?\nA. x\nB. y\n{letter}" and first.answer == "B"
    assert second.text.startswith("Who?\nA. p") and second.record.images == () and second.answer == "E"
    found = figures(opened, ["B", "A"])
    assert (found["accuracy"], found["image"], found["text"], found["neither"]) == (0.5, 1, 1, 0)
    assert (found["lower"], found["higher"], found["unreadable"]) == (1, 0, 0)


def test_scienceqa_img_asks_only_what_has_a_picture(science: Path) -> None:
    assert [one.record.id for one in SUITES["scienceqa-img"].opened(science).asked.questions] == ["7"]
    with pytest.raises(DataError, match="no split 'minitest', only train, test"):
        SUITES["scienceqa"].opened(science, split="minitest")


ROW: dict[str, Any] = {"index": 3, "question": "Which?", "A": "x", "B": "y", "C": "z", "answer": "C", "category": "c"}


def test_mmbench_rotates_options_and_wants_all_rotations_right(tmp_path: Path) -> None:
    mmbench(tmp_path, [ROW, {**ROW, "index": 4, "hint": "Hm.", "C": "", "answer": "A", "category": "d"}])
    opened = SUITES["mmbench"].opened(tmp_path)
    asked = opened.asked.questions
    assert [(one.record.id, one.answer) for one in asked] == [
        *[("3", "C"), ("3", "B"), ("3", "A")],
        *[("4", "A"), ("4", "B")],  # of two options, two rotations
    ]
    assert asked[1].text.startswith("Which?\nA. y\nB. z\nC. x\n") and asked[3].text.startswith("Hm.\nWhich?\nA. x")
    assert len({one.place for one in asked}) == 5 and Path(asked[0].record.images[0]).read_bytes() == picture()
    found = figures(opened, ["C", "B", "A", "A", "A"])
    assert (found["circular"], found["vanilla"], found["unreadable"]) == (0.5, 1, 0)
    assert figures(opened, ["B", "B", "A", "A", "B"])["circular"] == 0.5


def test_mmbench_rows_that_are_rotations_already(tmp_path: Path) -> None:
    turned = {**ROW, "index": 1_000_003, "image": "3", "A": "y", "B": "z", "C": "x", "answer": "B"}
    mmbench(tmp_path, [ROW, turned, {**ROW, "index": 9, "image": "77"}, {**ROW, "index": "x"}])
    opened = SUITES["mmbench"].opened(tmp_path)
    asked = opened.asked.questions
    assert [one.answer for one in asked] == ["C", "B"] and asked[0].record.images == asked[1].record.images
    assert [(bad.field, bad.reason) for bad in opened.asked.bad] == [
        ("image", "is that of row 77, which does not come before"),
        ("index", "is 'x', no number"),
    ]
    assert figures(opened, ["C", "C"]) == {"circular": 0, "vanilla": 1, "unreadable": 0}


def test_of_two_tables_none_is_guessed(tmp_path: Path) -> None:
    put(mmbench(tmp_path, [ROW]).with_name("mmbench_dev_2.tsv"), "index\n")
    with pytest.raises(
        DataError, match=r"has several files of questions: mmbench_dev_2\.tsv, .*; leave one, or choose a"
    ):
        SUITES["mmbench"].opened(tmp_path)


def test_a_limit_keeps_rotations_together(tmp_path: Path) -> None:
    mmbench(tmp_path, [{**ROW, "index": number} for number in range(8)])
    few = SUITES["mmbench"].opened(tmp_path, limit=6).asked.questions
    assert [one.record.id for one in few] == ["0", "0", "0", "4", "4", "4"]


def mmmu(root: Path) -> Path:
    empty = {f"image_{number}": None for number in range(1, 8)}
    rows = [
        {**empty, "id": "validation_Art_Theory_1", "question": "See <image 2>, then <image 1>?",
         "options": "['<image 1>', 'none']", "answer": "B", "question_type": "multiple-choice",
         "image_1": {"bytes": picture(1), "path": None}, "image_2": {"bytes": picture(2), "path": None}},
        {**empty, "id": "validation_Math_3", "question": "How many?", "options": "[]", "answer": "['4', 'four']",
         "question_type": "open", "image_1": {"bytes": picture(3), "path": None}},
    ]  # fmt: skip
    (root / "Art_Theory").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "Art_Theory" / "validation-00000-of-00001.parquet")
    return root


def test_mmmu_from_parquet_with_pictures_where_they_are_named(tmp_path: Path) -> None:
    opened = SUITES["mmmu"].opened(mmmu(tmp_path))
    first, second = opened.asked.questions
    user = first.record.turns[0].text
    assert user.startswith(f"See {PICTURE}, then {PICTURE}?\n\n(A) {PICTURE}\n(B) none\n\nAnswer with the option's")
    assert [Path(path).read_bytes() for path in first.record.images] == [picture(2), picture(1), picture(1)]
    assert second.record.turns[0].text.startswith(f"{PICTURE}\nHow many?") and "single word" in second.text
    assert figures(opened, ["B", "It is four"]) == {"accuracy": 1, "choice": 1, "open": 1, "guessed": 0}
    assert {one.meta["subject"] for one in opened.asked.questions} == {"Art_Theory", "Math"}


def test_mmmu_draws_what_it_cannot_read_and_always_alike(tmp_path: Path) -> None:
    opened = SUITES["mmmu"].opened(mmmu(tmp_path))
    draws = {opened.measure.judge(opened.asked.questions[0], "hm")["chosen"] for _ in range(20)}
    assert len(draws) == 1 and figures(opened, ["hm", "5"])["guessed"] == 1


def test_mmmu_from_json_with_pictures_by_name(tmp_path: Path) -> None:
    row = {"id": "validation_Math_1", "question": "<image 1> <image 2>", "options": ["1", "2"], "answer": "A",
           "question_type": "multiple-choice", "image_1": "p.png"}  # fmt: skip
    put(tmp_path / "validation.jsonl", json.dumps(row) + "\n")
    put(tmp_path / "images" / "p.png", picture())
    bad = SUITES["mmmu"].opened(tmp_path).asked.bad
    assert bad[0].field == "image_2" and "<image 2>" in bad[0].reason


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"question_type": "essay"}, "question_type", "is 'essay', neither multiple-choice nor open"),
        ({"answer": "?"}, "answer", "is '?', none of the options' letters: take the split validation"),
    ],
)
def test_a_row_of_mmmu_that_can_not_be_scored(tmp_path: Path, change: dict[str, str], field: str, reason: str) -> None:
    row = {"id": "validation_Math_1", "question": "Which?", "options": ["1", "2"], "answer": "A"}
    put(tmp_path / "validation.jsonl", json.dumps(row | change) + "\n")
    (bad,) = SUITES["mmmu"].opened(tmp_path).asked.bad
    assert (bad.field, bad.reason) == (field, reason)
