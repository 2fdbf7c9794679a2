"""Answers that never look at the picture."""

from __future__ import annotations

import pytest

from distilvlm.evaluate.baselines import majority, question_only


def test_majority_is_the_most_common_answer() -> None:
    assert majority(["no", "yes", "yes", "red"]) == "yes"


def test_of_equally_common_answers_the_first_counts() -> None:
    assert majority(["red", "no", "no", "red"]) == "red"


def test_question_only_answers_each_question_by_its_own_majority() -> None:
    pairs = [("colour?", "red"), ("colour?", "blue"), ("colour?", "blue"), ("round?", "yes"), ("round?", "yes")]
    baseline = question_only([*pairs, ("square?", "yes")])
    assert [baseline(question) for question in ("colour?", "round?", "never asked?")] == ["blue", "yes", "yes"]


def test_a_question_never_asked_gets_the_answers_of_the_one_most_like_it() -> None:
    pairs = [
        ("Is there a mass in the left lung?", "yes"),
        ("Is there a mass in the left lung?", "yes"),
        ("Is there a fracture of the skull?", "no"),
        ("Which organ is this?", "brain"),
    ]
    baseline = question_only([*pairs, *[("Is it normal?", "no")] * 3])
    assert baseline("is there a mass in the LUNG") == "yes"  # "mass" and "lung" are rare, "is there a" is not
    assert baseline("Which organ is that?") == "brain"
    assert baseline("Unheard words") == "no"


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="no training answers"):
        question_only([])
