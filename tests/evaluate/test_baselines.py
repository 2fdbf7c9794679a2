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


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="no training answers"):
        question_only([])
