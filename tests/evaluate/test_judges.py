"""Judges: what a rule can tell and what not, ratings made elsewhere, and the figures of either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distilvlm.data.problems import DataError
from distilvlm.evaluate import score
from distilvlm.evaluate.hallucination import Case, Judgement, LocalRule, Rated, Synonyms, judged, named_by, ratings
from distilvlm.evaluate.hallucination.captions import captions
from distilvlm.evaluate.hallucination.judges import rating_of
from distilvlm.evaluate.hallucination.prompted import objects_of
from tests.evaluate.asking import question

SYNONYMS = Synonyms([("person", ["man", "woman"]), ("dog", []), ("bench", [])])


def case(answer: str, contents: tuple[str, ...] = (), reference: str = "", row: int = 0) -> Case:
    return Case(("test.jsonl", row, 0), str(row), "Who sits on the bench?", contents, reference, answer)


@pytest.mark.parametrize(
    ("answer", "contents", "reference", "hallucinated"),
    [
        ("A man sits there.", ("Woman", "Bench"), "", False),  # both are persons
        ("A man sits there.", ("Bench",), "No one sits on the bench.", True),
        ("No one sits on the bench.", ("Door",), "No one is sitting on the bench.", False),
        ("A dog.", (), "There is a dog.", False),
        ("It is blue.", ("Dog",), "", None),  # names no object: a colour is beyond the rule
        ("", ("Dog",), "", None),
    ],
)
def test_the_rule_tells_objects_and_nothing_else(
    answer: str, contents: tuple[str, ...], reference: str, hallucinated: bool | None
) -> None:
    found = LocalRule(SYNONYMS)(case(answer, contents, reference))
    assert found.hallucinated is hallucinated and found.rating is None


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("It is fine.\nRating: 4, somewhat informative", 4),
        ("**Rating:** 0", 0),
        ("rating - 6", 6),
        ("Rating: 3. I repeat, rating: 3", 3),
        ("Rating: 2 or rather rating: 3", None),
        ("Rating: 9", None),
        ("a good answer", None),
    ],
)
def test_a_rating_is_read_out_of_words_or_left_undecided(text: str, rating: int | None) -> None:
    assert rating_of(text).rating == rating


def test_the_rate_is_the_share_of_ratings_below_three() -> None:
    questions = [question(row, question_type="attribute" if row < 4 else "counting") for row in range(6)]
    cases = [Case.of(one, "words") for one in questions]
    judgements = [Judgement.of_rating(rating) for rating in (6, 3, 2, 0, 1, None)]
    found = score(questions, ["words"] * 6, measure=ratings(cases, judgements), by_picture=True)
    means = {name: value and value.mean for name, value in found.figures.items()}
    assert means == pytest.approx({"hallucination_rate": 3 / 5, "score": 12 / 5, "undecided": 1 / 6})
    assert found.categories["attribute"]["hallucination_rate"].mean == 0.5
    assert found.categories["counting"]["score"].mean == 1
    assert [sample.details["verdict"] for sample in found.samples][2:] == [
        "hallucinates (2)",
        "hallucinates (0)",
        "hallucinates (1)",
        "undecided",
    ]


def test_where_nothing_was_rated_the_score_is_undefined() -> None:
    cases = [case("a dog", ("Dog",)), case("a dog", row=1)]
    judgements = judged(cases, LocalRule(SYNONYMS))
    found = score([question(0), question(1)], ["", ""], measure=ratings(cases, judgements))
    assert found.figures["score"] is None and found.figures["hallucination_rate"].mean == 0.5


def test_a_judge_may_find_the_mentions_of_captions() -> None:
    questions = [question(row, things={"dog": 1}) for row in range(3)]
    answers = ["something on four legs", "a man", "?"]
    cases = [Case.of(one, text) for one, text in zip(questions, answers, strict=True)]
    said = [Judgement(objects=("dogs",)), Judgement(objects=("man", "tree")), Judgement()]
    measure = captions(SYNONYMS, finder=named_by(cases, said, SYNONYMS)).led_by("response_rate", "mention_rate")
    found = score(questions, answers, measure=measure)
    assert measure.main.name == "response_rate" and found.main.mean == 0.5
    assert found.figures["coverage"].mean == 0.5  # of the two that the judge could tell
    assert cases[0].contents == ("dog",)


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ('["dog", "hot dog"]', ("dog", "hot dog")),
        ('Here it is [sic]:\n```json\n["dog"]\n```', ("dog",)),
        ("[]", ()),
        ("none", None),
        ('[1, 2] and {"a": ["b"]}', ("b",)),
    ],
)
def test_a_list_is_found_in_a_judges_words(text: str, objects: tuple[str, ...] | None) -> None:
    assert objects_of(text).objects == objects


CASES = [case("a", row=0), case("b", row=1)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"rating": 5}, {"rating": 1}], [(5, False), (1, True)]),
        ([{"row": 1, "rating": 1}, {"row": 0, "rating": 5}], [(5, False), (1, True)]),
        ([{"id": 1, "rating": 1}, {"id": 0, "rating": 5}], [(5, False), (1, True)]),
        ([{"hallucinated": False}, {"rating": None}], [(None, False), (None, None)]),
        (["well. Rating: 5", "bad. Rating: 1"], [(5, False), (1, True)]),
        (
            [  # the completions that MMHal-Bench's script saves
                {"id": "chatcmpl-1", "choices": [{"message": {"content": "Rating: 5"}}]},
                {"id": "chatcmpl-2", "choices": [{"message": {"content": "no idea"}}]},
            ],
            [(5, False), (None, None)],
        ),
    ],
)
def test_ratings_made_elsewhere_are_read(tmp_path: Path, rows: list, expected: list) -> None:
    (tmp_path / "rated.json").write_text(json.dumps(rows))
    judge = Rated(tmp_path / "rated.json", CASES)
    found = judged(CASES, judge)
    assert [(one.rating, one.hallucinated) for one in found] == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"rating": 5}], "has 1 judgements for 2 answers"),
        ([{"rating": 7}, {"rating": 5}], "row 0: rating 7 is not one of 0 to 6"),
        ([{"mark": 5}, {"rating": 5}], "row 0: no judgement; write rating, hallucinated, objects or text"),
        ([3, {"rating": 5}], "row 0: no judgement; write an object with rating, hallucinated, objects or text"),
        ([{"row": 0, "rating": 5}], "has no judgement for 1"),
    ],
)
def test_ratings_that_fit_no_answer_are_refused(tmp_path: Path, rows: list, message: str) -> None:
    (tmp_path / "rated.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message):
        Rated(tmp_path / "rated.json", CASES)
