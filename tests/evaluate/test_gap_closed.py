"""How much of the gap between a control and a teacher a student closes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest

from distilvlm.data import Record, SampleKey, Turn
from distilvlm.evaluate import ACCURATE, Evaluation, gap_closed, score
from distilvlm.evaluate.questions import Question

COUNT = 60


def having(right: Collection[int], better: str = "higher", first: int = 0) -> Evaluation:
    """60 questions on 30 pictures, of which these are right."""
    questions = []
    for row in range(COUNT):
        turns = (Turn("user", f"{first + row}?"), Turn("assistant", "red"))
        questions.append(Question(Record(SampleKey("t", "t", row), str(row), (f"{row // 2}.png",), turns), 0))
    figures = (replace(ACCURATE.main, better=better), *ACCURATE.figures[1:])
    measure = replace(ACCURATE, figures=figures)
    return score(
        questions, ["red" if row in right else "blue" for row in range(COUNT)], measure=measure, by_picture=True
    )


def test_nothing_is_closed_by_the_control_and_all_by_the_teacher() -> None:
    teacher, control = having(range(0, 50)), having(range(20, 40))
    none, all_of_it = gap_closed(control, control, teacher), gap_closed(teacher, control, teacher)
    assert none is not None and vars(none) == {"mean": 0, "low": 0, "high": 0}
    assert all_of_it is not None and vars(all_of_it) == pytest.approx({"mean": 1, "low": 1, "high": 1})


def test_the_share_is_that_of_the_figures_and_its_interval_holds_it() -> None:
    teacher, control, student = having(range(0, 50)), having(range(20, 40)), having(range(0, 35))
    found = gap_closed(student, control, teacher)
    assert found is not None and found.mean == pytest.approx((35 - 20) / (50 - 20))
    assert 0 < found.low < found.mean < found.high < 1.2


def test_a_student_may_be_worse_than_the_control_or_better_than_the_teacher() -> None:
    teacher, control = having(range(0, 50)), having(range(20, 40))
    worse, better = having(range(5)), having(range(COUNT))
    low, high = gap_closed(worse, control, teacher), gap_closed(better, control, teacher)
    assert low is not None and low.mean == pytest.approx(-0.5)
    assert high is not None and high.mean == pytest.approx(4 / 3)


def test_where_lower_is_better_the_share_is_the_same() -> None:
    teacher, control, student = (having(r, "lower") for r in (range(20, 40), range(0, 50), range(0, 35)))
    found = gap_closed(student, control, teacher)
    assert found is not None and found.mean == pytest.approx((50 - 35) / (50 - 20))
    assert gap_closed(student, teacher, control) is None  # the "teacher" is behind


def test_there_is_nothing_to_close_where_the_teacher_is_not_clearly_ahead() -> None:
    control, student = having(range(0, 30)), having(range(0, 31))
    assert gap_closed(student, control, having(range(1, 32))) is None  # ahead by one, which may be chance
    assert gap_closed(student, control, having(range(0, 20))) is None
    assert gap_closed(having(range(10), "neither"), having(range(5), "neither"), having(range(40), "neither")) is None


def test_other_questions_are_refused() -> None:
    teacher, control = having(range(0, 50)), having(range(20, 40))
    with pytest.raises(ValueError, match="different questions"):
        gap_closed(having(range(9), first=1), control, teacher)
