"""CHAIR and Object HalBench's rates against counts by hand; annotations as COCO publishes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distilvlm.data.problems import DataError
from distilvlm.evaluate import difference, score
from distilvlm.evaluate.hallucination import Synonyms, annotated, captions, default_synonyms, read_annotations
from distilvlm.evaluate.questions import Asked
from tests.evaluate.asking import question

SYNONYMS = Synonyms([("person", ["man", "woman"]), ("dog", ["puppy"]), ("cat", []), ("hot dog", []), ("bus", [])])

# what is there, the caption
CAPTIONS = [
    ({"dog": 2, "person": 1}, "A man with a dog and another dog, and a cat."),  # 4 mentions, 1 false
    ({"dog": 1}, "A puppy. The dog sleeps."),  # 2 mentions
    ({"cat": 1, "bus": 1}, "A man eats a hot dog; the hot dog is long."),  # 3 mentions, all false, 2 words
    ({"person": 3}, "A sunny day."),  # nothing
    ({}, "A quiet street."),
]


def asked() -> list:
    return [question(row, things=things) for row, (things, _) in enumerate(CAPTIONS)]


def described(texts: list[str] | None = None):
    return score(asked(), texts or [text for _, text in CAPTIONS], measure=captions(SYNONYMS), by_picture=True)


def test_the_figures_are_those_counted_by_hand() -> None:
    means = {name: found.mean for name, found in described().figures.items()}
    assert means == pytest.approx(
        {
            "chair_i": 4 / 9,
            "chair_s": 2 / 5,
            "coverage": 3 / 6,  # dog, person; dog; neither cat nor bus; no person
            "response_rate": 2 / 3,  # only three name anything
            "mention_rate": 3 / 7,  # man, dog, cat; puppy, dog; man, hot dog
            "length": 33 / 5,
        }
    )


def test_each_caption_tells_what_it_names_and_what_is_not_there() -> None:
    details = [sample.details for sample in described().samples]
    assert details[0]["mentioned"] == {"person": ["man"], "dog": ["dog", "dog"], "cat": ["cat"]}
    assert (details[0]["hallucinated"], details[0]["missed"]) == (["cat"], [])
    assert (details[1]["right"], details[1]["verdict"]) == (True, "names nothing false")
    assert (details[2]["hallucinated"], details[2]["missed"]) == (["person", "hot dog"], ["bus", "cat"])
    assert details[2]["verdict"] == "not there: person, hot dog" and not details[2]["right"]


def test_captions_that_name_nothing_leave_the_rates_of_mentions_undefined() -> None:
    found = described(["A sunny day."] * 5)
    assert (found.figures["chair_i"], found.figures["mention_rate"], found.figures["response_rate"]) == (None,) * 3
    assert (found.figures["chair_s"].mean, found.figures["coverage"].mean) == (0, 0)
    assert difference(found, described()) is None


def test_pictures_without_anything_leave_coverage_undefined() -> None:
    found = score([question(0, things={})], ["a dog"], measure=captions(SYNONYMS))
    assert found.figures["coverage"] is None and found.figures["chair_i"].mean == 1


def test_the_difference_is_of_chair_i_though_each_model_names_another_number() -> None:
    better = described(["a dog", "a dog", "a cat", "a man", "nothing"])
    assert difference(better, described()).mean == pytest.approx(0 - 4 / 9)
    assert difference(better, described(), "coverage").mean == pytest.approx(4 / 6 - 3 / 6)


def test_a_count_of_none_is_not_there() -> None:
    found = score([question(0, things={"dog": 0, "cat": 1})], ["a dog"], measure=captions(SYNONYMS))
    assert found.samples[0].details["there"] == ["cat"] and found.figures["chair_i"].mean == 1


def test_what_references_name_is_there_only_when_asked_for() -> None:
    told = [question(0, "a man and his dog", things={"dog": 1}, captions=["a bus"])]
    text = ["a woman on a bus"]
    assert score(told, text, measure=captions(SYNONYMS)).figures["chair_i"].mean == 1
    assert score(told, text, measure=captions(SYNONYMS, references=True)).figures["chair_i"].mean == 0


def test_who_finds_nothing_is_left_out_of_all_rates() -> None:
    measure = captions(
        SYNONYMS, finder=lambda asked, text: None if asked.turn or "?" in text else SYNONYMS.mentions(text)
    )
    found = score(asked()[:2], ["?", "a cat"], measure=measure)
    assert found.figures["chair_s"].mean == 1 and found.figures["coverage"].mean == 0
    assert found.samples[0].details["verdict"] == "not judged" and not found.samples[0].details["right"]


def test_a_question_that_does_not_say_what_is_there_is_refused() -> None:
    with pytest.raises(DataError, match=r"test\.jsonl, row 7: nothing says what is in its picture"):
        score([question(7)], ["a dog"], measure=captions(SYNONYMS))


def test_the_default_table_has_the_names_that_annotations_have() -> None:
    table = default_synonyms(asked(), ["zebra"])
    assert table.objects == ("zebra", "bus", "cat", "dog", "person")


def coco(path: Path) -> list[Path]:
    pictures = [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}, {"id": 7, "file_name": "000000000007.jpg"}]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 6, "name": "bus"}]
    things = [
        {"image_id": 42, "category_id": 18},
        {"image_id": 42, "category_id": 18},
        {"image_id": 42, "category_id": 1},
    ]
    instances, told = path / "instances.json", path / "captions.json"
    instances.write_text(json.dumps({"images": pictures, "categories": categories, "annotations": things}))
    told.write_text(json.dumps({"images": pictures, "annotations": [{"image_id": 7, "caption": "A bus."}]}))
    return [instances, told]


def test_cocos_files_say_what_is_in_a_picture_by_number_or_by_file(tmp_path: Path) -> None:
    questions = (
        question(0, image_id=42),
        question(1, picture="/data/val2014/COCO_val2014_000000000042.jpg"),
        question(2, image_id="000000000007"),
    )
    found, table = annotated(Asked("test", questions), coco(tmp_path))
    assert [one.meta["things"] for one in found.questions] == [{"dog": 2, "person": 1}] * 2 + [{}]
    assert found.questions[2].meta["captions"] == ["A bus."]
    assert table.objects == ("person", "dog", "bus")  # a class that no picture shows can be made up
    scored = score(found.questions, ["a dog", "a bus", "a bus"], measure=captions(table, references=True))
    assert [sample.details["hallucinated"] for sample in scored.samples] == [[], ["bus"], []]


def test_a_picture_that_the_annotations_lack_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test\.jsonl, row 0: the annotations have no picture 43"):
        annotated(Asked("test", (question(0, image_id=43),)), coco(tmp_path))


def test_files_that_are_no_annotations_are_named(tmp_path: Path) -> None:
    instances, told = coco(tmp_path)
    with pytest.raises(DataError, match=r"no objects in .*captions\.json"):
        read_annotations([told])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match=r"list\.json has no lists 'images' and 'annotations'"):
        read_annotations([instances, tmp_path / "list.json"])
    with pytest.raises(DataError, match=r"none\.json can't be read"):
        read_annotations([tmp_path / "none.json"])
    content = json.loads(instances.read_text())
    content["annotations"].append({"image_id": 42, "category_id": 99})
    instances.write_text(json.dumps(content))
    with pytest.raises(DataError, match="category 99"):
        read_annotations([instances])
    for where, row, key in (("categories", {"id": 3}, "name"), ("images", {"file_name": "8.jpg"}, "id")):
        content[where].append(row)
        instances.write_text(json.dumps(content))
        with pytest.raises(DataError, match=rf"instances\.json: an entry of '{where}' has no '{key}'"):
            read_annotations([instances])
    for wrong in ("eight", "²"):
        content["images"][-1]["id"] = wrong
        instances.write_text(json.dumps(content))
        with pytest.raises(DataError, match=f"'id' of an entry of 'images' is '{wrong}', which is no picture's number"):
            read_annotations([instances])
