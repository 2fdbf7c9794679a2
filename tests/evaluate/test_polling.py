"""POPE's figures against counts by hand, and how answers are read."""

from __future__ import annotations

import pytest

from distilvlm.data.problems import DataError
from distilvlm.evaluate import difference, score
from distilvlm.evaluate.hallucination.polling import POLLING, blind_answers, is_unclear, said
from tests.evaluate.asking import question

# truth, answer: 4 true yes, 1 false no, 2 false yes, 3 true no
ANSWERS = [
    ("yes", "Yes"),
    ("yes", "yes, there is."),
    ("yes", "Yes. No wait."),
    ("yes", "There is a dog in it."),
    ("yes", "No"),
    ("no", "yes"),
    ("no", "Yes, a small one"),
    ("no", "no"),
    ("no", "No, there is none."),
    ("no", "There is not any"),
]


def asked(how: str = "random") -> list:
    return [question(row, truth, "Is there a dog?", how=how, thing="dog") for row, (truth, _) in enumerate(ANSWERS)]


def polled(answers: list[str] | None = None):
    return score(asked(), answers or [answer for _, answer in ANSWERS], measure=POLLING, by_picture=True)


def means(evaluation) -> dict[str, float | None]:
    return {name: None if found is None else found.mean for name, found in evaluation.figures.items()}


def test_the_figures_are_those_counted_by_hand() -> None:
    assert means(polled()) == pytest.approx(
        {
            "f1": 8 / 11,  # 2 TP / (2 TP + FP + FN)
            "accuracy": 7 / 10,
            "yes_ratio": 6 / 10,
            "precision": 4 / 6,
            "recall": 4 / 5,
            "unclear": 1 / 10,
            "empty": 0,
        }
    )


def test_f1_is_the_harmonic_mean_of_precision_and_recall_with_an_interval_around_it() -> None:
    found = polled()
    precision, recall = found.figures["precision"].mean, found.figures["recall"].mean
    f1 = found.figures["f1"]
    assert f1.mean == pytest.approx(2 * precision * recall / (precision + recall))
    assert 0.2 < f1.low < f1.mean < f1.high <= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No, there isn't.", "no"),
        ("There is not a dog.", "no"),
        ("Yes. There is no cat.", "yes"),  # only the first sentence counts
        ("I see a dog", "yes"),
        ("Yes,no", "yes"),  # "Yesno" once commas are gone, as in POPE's script
        ("NO", "yes"),  # neither "No" nor "no"
        ("Nothing", "yes"),
        ("", None),
        (" \n", None),
        ("?!", None),
    ],
)
def test_an_answer_is_read_by_the_published_rule_unless_there_is_no_word_in_it(text: str, expected: str | None) -> None:
    assert said(text) == expected


def test_a_yes_that_no_word_says_is_unclear() -> None:
    assert is_unclear("I see a dog") and is_unclear("NO!") and is_unclear("blue blue blue. yes")
    assert not is_unclear("YES!") and not is_unclear("no") and not is_unclear("")


def test_an_empty_answer_is_wrong_whatever_the_truth_and_no_yes() -> None:
    found = polled(["" for _ in ANSWERS])
    assert means(found) == {
        "f1": 0,
        "accuracy": 0,
        "yes_ratio": 0,
        "precision": None,  # never says yes
        "recall": 0,
        "unclear": 0,
        "empty": 1,
    }
    assert [sample.details["verdict"] for sample in found.samples] == ["no answer"] * 10


def test_without_any_yes_precision_is_undefined_and_f1_is_nothing() -> None:
    found = polled(["no" for _ in ANSWERS])
    assert found.figures["precision"] is None and found.figures["f1"].mean == 0
    assert (found.figures["recall"].mean, found.figures["accuracy"].mean) == (0, 0.5)
    assert found.summary()["precision"] is None


def test_without_a_true_yes_recall_is_undefined() -> None:
    questions = [question(row, "no", how="random") for row in range(3)]
    found = score(questions, ["no"] * 3, measure=POLLING)
    assert found.figures["recall"] is None and found.figures["f1"] is None  # nothing to find, nothing found
    assert score(questions, ["yes", "no", "no"], measure=POLLING).figures["f1"].mean == 0


def test_categories_are_told_apart_in_the_published_order() -> None:
    questions = [*asked("adversarial"), *asked("random"), *asked("of my own")]
    answers = [answer for _, answer in ANSWERS]
    found = score(questions, [*["yes"] * 10, *answers, *answers], measure=POLLING)
    assert list(found.categories) == ["random", "adversarial", "of my own"]
    assert found.categories["random"]["accuracy"].mean == 0.7
    assert found.categories["adversarial"]["yes_ratio"].mean == 1
    assert found.figures["accuracy"].mean == pytest.approx((5 + 7 + 7) / 30)
    summary = found.summary()["categories"]["adversarial"]
    assert (summary["n"], summary["f1"]["mean"]) == (10, pytest.approx(2 / 3))


def test_differences_are_paired_and_of_f1_unless_another_figure_is_asked_for() -> None:
    better, worse = polled([truth for truth, _ in ANSWERS]), polled()
    assert difference(better, worse).mean == pytest.approx(1 - 8 / 11)
    assert difference(better, worse, "accuracy").mean == pytest.approx(0.3)
    assert difference(polled(["no"] * 10), worse, "precision") is None
    with pytest.raises(ValueError, match="measure 'polling' has no figure 'exact_match'"):
        difference(better, worse, "exact_match")


def test_questions_of_one_picture_are_drawn_together() -> None:
    questions = [question(row, "yes", picture=f"{row // 10}.jpg") for row in range(40)]
    answers = ["yes"] * 20 + ["no"] * 20
    alone = score(questions, answers, measure=POLLING).figures["recall"]
    together = score(questions, answers, measure=POLLING, by_picture=True).figures["recall"]
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_baselines_never_look() -> None:
    training = [("Is there a dog?", "no"), ("Is there a dog?", "no"), ("Is there a cat?", "yes")]
    given = blind_answers(asked(), training)
    assert {name: {*texts} for name, texts in given.items()} == {
        "always-yes": {"yes"},
        "always-no": {"no"},
        "question-only": {"no"},
    }
    assert "question-only" not in blind_answers(asked())
    always_yes = score(asked(), given["always-yes"], measure=POLLING)
    assert means(always_yes) | {"f1": 2 / 3} == means(always_yes)


def test_another_answer_than_yes_or_no_is_no_polling_question() -> None:
    with pytest.raises(DataError, match=r"test\.jsonl, row 3: the answer is 'maybe'"):
        score([question(3, "maybe")], ["yes"], measure=POLLING)


def test_details_are_written_and_read_back(tmp_path) -> None:
    from distilvlm.evaluate import rescored

    found = polled()
    found.write(tmp_path / "polled.jsonl")
    assert rescored(tmp_path / "polled.jsonl", measure=POLLING, by_picture=True) == found
    assert found.samples[3].details == {
        "truth": "yes",
        "said": "yes",
        "unclear": True,
        "right": True,
        "verdict": "right, but unclear",
        "how": "random",
        "thing": "dog",
    }
