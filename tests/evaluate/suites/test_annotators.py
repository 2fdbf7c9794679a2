"""VQA accuracy: the official normalisation, ten people, leaving each out."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilvlm.data.problems import DataError
from distilvlm.evaluate.suites import SUITES
from distilvlm.evaluate.suites.annotators import agreement, as_textvqa, as_vizwiz, as_vqa
from distilvlm.evaluate.suites.normalisation import CONTRACTIONS, processed, punctuation, words

from .small_data import figures, picture, put, ten, vqav2


@pytest.mark.parametrize(
    ("matching", "worth"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_an_answer_is_worth_what_leaving_each_person_out_makes_of_it(matching: int, worth: float) -> None:
    # k of ten: (k * min(1, (k - 1) / 3) + (10 - k) * min(1, k / 3)) / 10
    assert agreement("red", ["red"] * matching + ["blue"] * (10 - matching)) == pytest.approx(worth)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog", "dog"),
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # two apostrophes are missing: the table has no such key
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("yes, there is", "yes there is"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("black /white-ish", "black white ish"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits makes every mark go without a space
        ("3.5", "3.5"),
        ("end. of", "end of"),
        ("10:30", "10:30"),  # colons stay
        ("a", ""),
        ("", ""),
    ],
)
def test_official_normalisation(text: str, expected: str) -> None:
    assert words(punctuation(text)) == expected


def test_textvqas_processor_also_drops_commas_and_sets_the_genitive_apart() -> None:
    assert processed("Joe's, ") == "joe 's"
    assert processed("What?") == "what"
    assert processed("1,000 t-shirts") == "1000 t shirts"  # the comma is gone before the rule for marks looks for it


def test_every_contraction_is_found_without_one_of_its_apostrophes() -> None:
    assert (CONTRACTIONS["aint"], CONTRACTIONS["twas"], CONTRACTIONS["y'alld've"]) == ("ain't", "'twas", "y'all'd've")
    assert CONTRACTIONS["shed've"] == "she'd've" and "shed" not in CONTRACTIONS and "wed" not in CONTRACTIONS


def test_where_people_agree_vqav2_compares_as_it_stands() -> None:
    said, given = as_vqa("The dog", ["a dog"] * 10)
    assert said == "dog" and given[0] == "a dog"  # so this is wrong, on the official server, too
    said, given = as_vqa("Two", ["two"] * 9 + ["3"])
    assert said == "2" and given[:1] == ["2"]


def test_plurals_are_other_answers() -> None:
    assert agreement(*as_vqa("dogs", ["dog"] * 5 + ["a dog"] * 5)) == 0


def test_vizwiz_compares_what_people_said_as_it_stands_and_textvqa_does_not() -> None:
    assert agreement(*as_vizwiz("Unanswerable.", ["unanswerable"] * 10)) == 1
    assert agreement(*as_vizwiz("a dog", ["a dog"] * 10)) == 0
    assert agreement(*as_textvqa("a dog", ["A Dog!"] * 10)) == 1


def test_vqav2_from_its_two_files(tmp_path: Path) -> None:
    opened = vqav2(tmp_path, [ten(red=3, blue=7), ["yes"] * 10, ten(red=10)])
    first = opened.asked.questions[0]
    assert first.text == "What is 0?\nAnswer the question using a single word or phrase."
    assert first.record.images == (str(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"),)
    found = figures(opened, ["red", "yes, there is", ""])
    assert found["vqa_accuracy"] == pytest.approx(0.9 / 3)  # "yes there is" is not "yes"; an empty answer is nobody's
    assert found["agreed"] == 0


def test_a_split_without_its_files_says_what_is_missing(tmp_path: Path) -> None:
    vqav2(tmp_path, [["yes"] * 10])
    with pytest.raises(DataError, match=r"v2_OpenEnded_mscoco_test2015_questions.json.*docs/suites.md"):
        SUITES["vqav2"].opened(tmp_path, split="test2015")


def test_files_that_are_not_those_that_are_published_are_named(tmp_path: Path) -> None:
    vqav2(tmp_path, [["yes"] * 10])
    questions = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    for content, reason in (
        ({"questions": []}, r"questions\.json: no question of vqav2"),
        ({"questions": "none"}, r"questions\.json: no list 'questions' in it: is it the published file\?"),
    ):
        put(questions, content)
        with pytest.raises(DataError, match=reason):
            SUITES["vqav2"].opened(tmp_path)


def test_a_picture_that_is_not_there_is_a_bad_row(tmp_path: Path) -> None:
    vqav2(tmp_path, [["yes"] * 10])
    (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg").unlink()
    bad = SUITES["vqav2"].opened(tmp_path).asked.bad
    assert [row.field for row in bad] == ["image"] and "COCO_val2014_000000000042.jpg" in bad[0].reason


def test_vizwiz_from_its_file(tmp_path: Path) -> None:
    row = {
        "image": "VizWiz_val_00000001.jpg",
        "question": "What is this?",
        "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}] * 7
        + [{"answer": "soup", "answer_confidence": "maybe"}] * 3,
        "answer_type": "unanswerable",
        "answerable": 0,
    }
    put(tmp_path / "val.json", [row])
    put(tmp_path / "val" / row["image"], picture())
    opened = SUITES["vizwiz"].opened(tmp_path)
    assert "respond with 'Unanswerable'" in opened.asked.questions[0].text
    assert figures(opened, ["Soup"])["vqa_accuracy"] == pytest.approx(0.9)


def test_textvqa_from_its_file_with_and_without_ocr(tmp_path: Path) -> None:
    row = {"question": "what brand?", "image_id": "0a", "question_id": 5, "answers": ten(nokia=10), "set_name": "val"}
    put(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})
    put(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "0a", "ocr_tokens": ["NOKIA", "12"]}]})
    put(tmp_path / "train_images" / "0a.jpg", picture())
    assert "NOKIA" not in SUITES["textvqa"].opened(tmp_path).asked.questions[0].text
    prompt = "{question}\nReference OCR token: {ocr}"
    opened = SUITES["textvqa"].opened(tmp_path, prompt=prompt)
    assert opened.asked.questions[0].text == "what brand?\nReference OCR token: NOKIA, 12"
    assert figures(opened, ["Nokia!"])["vqa_accuracy"] == 1


def test_a_prompt_with_an_unknown_name_says_which_are_known(tmp_path: Path) -> None:
    vqav2(tmp_path, [["yes"] * 10])
    with pytest.raises(DataError, match=r"prompt '\{frage\}'.*\{question\}"):
        SUITES["vqav2"].opened(tmp_path, prompt="{frage}")
