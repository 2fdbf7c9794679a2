"""GQA, MME, captions, and the suites that other rooms judge: their files and figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distilvlm.data.problems import DataError
from distilvlm.evaluate import score
from distilvlm.evaluate.suites import SUITES
from distilvlm.evaluate.suites.captions import bleu
from distilvlm.evaluate.suites.tokens import tokens

from .small_data import figures, mme, picture, put


def test_gqa_from_its_file_counts_balanced_questions(tmp_path: Path) -> None:
    kinds = [("query", "yellow", True), ("verify", "yes", True), ("query", "x", False)]
    rows = {
        f"0{number}": {"imageId": "n1", "question": "What?", "answer": answer, "isBalanced": balanced,
                       "types": {"structural": kind, "semantic": "attr", "detailed": "d"}}
        for number, (kind, answer, balanced) in enumerate(kinds)
    }  # fmt: skip
    put(tmp_path / "testdev_balanced_questions.json", rows)
    put(tmp_path / "images" / "n1.jpg", picture())
    opened = SUITES["gqa"].opened(tmp_path)
    assert [one.record.id for one in opened.asked.questions] == ["00", "01"]
    assert figures(opened, ["Yellow.", "yes, there is"]) == {"accuracy": 0.5, "binary": 0, "open": 1}
    assert figures(opened, ["a yellow", "yes"]) == {"accuracy": 0.5, "binary": 1, "open": 0}  # articles count


def test_mme_sums_accuracy_and_accuracy_plus_of_subtasks(tmp_path: Path) -> None:
    opened = SUITES["mme"].opened(mme(tmp_path, {"existence": 2, "artwork": 1, "code_reasoning": 1}))
    asked = opened.asked.questions
    assert asked[0].text == "Is 0 a here?\nAnswer the question using a single word or phrase."
    assert [one.meta["group"] for one in asked[::2]] == [
        *("existence/0000", "existence/0001", "artwork/0000", "code_reasoning/0000")
    ]
    # existence: 3 of 4, 1 of 2 pictures; artwork: all; code: 1 of 2, no picture
    found = figures(opened, ["Yes, there is", "no.", "yes", "well, no", "yes", "NO", "no", "nope"])
    assert found["perception"] == pytest.approx(75 + 50 + 200) and found["existence"] == pytest.approx(125)
    assert found["cognition"] == pytest.approx(50) and found["code_reasoning"] == pytest.approx(50)
    assert found["accuracy"] == pytest.approx(6 / 8) and found["accuracy_plus"] == pytest.approx(2 / 4)
    assert found["neither"] == pytest.approx(1 / 8)  # "well, no" begins with neither
    assert "count" not in found  # was not asked


def test_a_picture_of_mme_has_two_questions(tmp_path: Path) -> None:
    mme(tmp_path, {"existence": 1})
    put(tmp_path / "existence" / "0000.txt", "Is it? Please answer yes or no.\tYes\n")
    opened = SUITES["mme"].opened(tmp_path)
    assert "1 questions, two" in opened.asked.bad[0].reason
    put(tmp_path / "existence" / "0000.txt", "Is it? Please answer yes or no.\tYes\nIs it not?\tMaybe\n")
    (bad,) = SUITES["mme"].opened(tmp_path).asked.bad
    assert (bad.field, bad.reason) == ("answer", "0000.txt, line 2: 'Maybe' is neither Yes nor No")
    with pytest.raises(DataError, match="no directory of a subtask"):
        SUITES["mme"].opened(tmp_path / "existence")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man doesn't ride the dog's bike (red).", "a man does n't ride the dog 's bike -lrb- red -rrb-"),
        ("Black-and-white, 3.5 at 10:30 p.m.!", "black-and-white 3.5 at 10:30 p.m."),
        ('I cannot -- won\'t... "stop"', "i can not wo n't stop"),
        ("Dr. Who vs. St. Paul", "dr. who vs. st. paul"),
        ("wow!! 20,000 fans?", "wow !! 20,000 fans"),
        ("", ""),
    ],
)
def test_words_are_those_of_the_java_tokeniser(text: str, expected: str) -> None:
    assert " ".join(tokens(text)) == expected


def karpathy(root: Path) -> None:
    images = [
        {"filename": f"{n}.jpg", "imgid": n, "split": split, "sentences": [{"raw": raw} for raw in captions]}
        for n, (split, captions) in enumerate(
            [
                ("test", ["A dog runs on the green grass.", "The brown dog is running fast."]),
                ("train", ["unused"]),
                ("test", ["Two cats sleep on a red sofa."]),
            ]
        )
    ]
    put(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    for number in range(3):
        put(root / "flickr30k-images" / f"{number}.jpg", picture(number))


def test_captions_score_as_the_authors_package_does(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap", reason="pip install 'distilvlm[captions]'")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    karpathy(tmp_path)
    opened = SUITES["flickr30k"].opened(tmp_path)
    assert opened.asked.questions[0].text == "Provide a one-sentence caption for the provided image."
    said = ["A brown dog runs on the grass.", "two cats on the sofa"]
    found = figures(opened, said)
    true = {
        n: [" ".join(tokens(text)) for text in one.meta["captions"]] for n, one in enumerate(opened.asked.questions)
    }
    given = {n: [" ".join(tokens(text))] for n, text in enumerate(said)}
    assert found["cider"] == pytest.approx(100 * Cider().compute_score(true, given)[0])
    assert found["rouge_l"] == pytest.approx(100 * Rouge().compute_score(true, given)[0])
    theirs = Bleu(4).compute_score(true, given, verbose=0)[0]
    assert [found[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx([100 * one for one in theirs])
    nothing = figures(opened, ["", ""])
    assert (nothing["cider"], nothing["bleu_4"], nothing["rouge_l"]) == (0, pytest.approx(0), 0)
    right = figures(opened, ["A dog runs on the green grass.", "Two cats sleep on a red sofa."])
    assert right["bleu_4"] == pytest.approx(100, abs=1e-3) and right["rouge_l"] == pytest.approx(100)


def test_bleu_punishes_what_is_short() -> None:
    import numpy as np

    sums = np.array([[2.0, 1, 0, 0, 2, 1, 0, 0, 2, 4]])  # two right words of two, where a reference has four
    assert bleu(2)(sums)[0] == pytest.approx(100 * np.exp(1 - 4 / 2))


def test_coco_captions_from_the_annotations(tmp_path: Path) -> None:
    images = [{"id": 5, "file_name": "COCO_val2014_000000000005.jpg"}, {"id": 6, "file_name": "6.jpg"}]
    annotations = [{"image_id": 5, "caption": text} for text in ("A dog.", "One dog.")]
    put(tmp_path / "captions_val2014.json", {"images": images, "annotations": annotations})
    put(tmp_path / "val2014" / images[0]["file_name"], picture())
    asked = SUITES["coco-captions"].opened(tmp_path).asked
    assert [one.meta["captions"] for one in asked.questions] == [["A dog.", "One dog."]]
    assert [(row.field, row.reason) for row in asked.bad] == [("captions", "nobody describes 6.jpg")]


def test_pope_from_its_files(tmp_path: Path) -> None:
    row = '{"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}\n'
    for how in ("random", "popular"):
        put(tmp_path / f"coco_pope_{how}.json", row)
    put(tmp_path / "val2014" / "a.jpg", picture())
    opened = SUITES["pope"].opened(tmp_path)
    assert opened.asked.questions[0].text.endswith("?\nAnswer the question using a single word or phrase.")
    assert {one.meta["how"] for one in opened.asked.questions} == {"random", "popular"}
    assert figures(opened, ["Yes", "No"])["accuracy"] == 0.5


def test_chair_from_cocos_annotations(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    objects = {"images": images, "categories": categories, "annotations": [{"image_id": 1, "category_id": 1}]}
    put(tmp_path / "instances_val2014.json", objects)
    put(tmp_path / "captions_val2014.json", {"images": images, "annotations": [{"image_id": 1, "caption": "A pup."}]})
    put(tmp_path / "synonyms.txt", "dog, puppy\ncat, pup\n")
    put(tmp_path / "val2014" / "1.jpg", picture())
    opened = SUITES["chair"].opened(tmp_path)
    assert [one.text for one in opened.asked.questions] == ["Please describe this image in detail."]
    assert figures(opened, ["a puppy and a cat"])["chair_i"] == 0  # a caption names the cat
    (tmp_path / "synonyms.txt").unlink()
    assert figures(SUITES["chair"].opened(tmp_path), ["a dog and a cat"])["chair_i"] == 0.5


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_refcoco_from_its_lines(tmp_path: Path, name: str) -> None:
    size = {"height": 20, "width": 30}
    row = {"img_path": "a.png", "expression": "left one", "sent_id": 1, "bbox": [0, 0, 15, 20], **size}
    put(tmp_path / f"REC_{name}_unc_val.jsonl", json.dumps(row) + "\n")
    put(tmp_path / "images" / "a.png", picture())
    opened = SUITES[name].opened(tmp_path)
    one = opened.asked.questions[0]
    assert "left one" in one.text and one.meta["boxes"] == [[0, 0, 15, 20]]
    assert figures(opened, [one.answer])["acc"] == 1 and figures(opened, ["nowhere"])["acc"] == 0


def test_intervals_and_pairs_of_totals(tmp_path: Path) -> None:
    from distilvlm.evaluate import difference

    opened = SUITES["mme"].opened(mme(tmp_path, {"existence": 6}))
    a, b = (
        score(opened.asked.questions, said, measure=opened.measure, by_picture=True, resamples=300)
        for said in (["yes", "no"] * 6, ["yes", "yes"] * 3 + ["yes", "no"] * 3)
    )
    total = a.figures["perception"]
    assert total is not None and (total.low, total.mean, total.high) == (200, 200, 200)
    gap = difference(a, b, "perception")
    assert gap is not None and gap.mean == pytest.approx(200 - (75 + 50)) and gap.low < gap.mean < gap.high
