"""Every assistant turn is asked on its own, with what belongs to the whole record."""

from __future__ import annotations

from distilvlm.data.batch import SampleKey
from distilvlm.data.records import PICTURE, Record, Turn
from distilvlm.evaluate.questions import questions_of

SYSTEM = Turn("system", "be brief")


def record(*turns: Turn, images: tuple[str, ...] = ("a.png",)) -> Record:
    return Record(SampleKey("test", "test.json", 7), "seven", images, turns)


def test_each_answer_is_asked_without_the_turns_before_it() -> None:
    first, second = Turn("user", f"{PICTURE}\nwhat?"), Turn("user", "which colour?")
    asked = list(questions_of([record(SYSTEM, first, Turn("assistant", "a cube"), second, Turn("assistant", "red"))]))
    assert [question.record.turns for question in asked] == [
        (SYSTEM, first, Turn("assistant", "a cube")),
        (SYSTEM, Turn("user", f"{PICTURE}\nwhich colour?"), Turn("assistant", "red")),
    ]
    assert [(question.text, question.answer) for question in asked] == [("what?", "a cube"), ("which colour?", "red")]
    assert [question.place for question in asked] == [("test.json", 7, 0), ("test.json", 7, 1)]


def test_every_question_shows_every_picture_once() -> None:
    turns = (Turn("user", f"{PICTURE}\nthis?"), Turn("assistant", "x"), Turn("user", f"and {PICTURE} that?"))
    asked = list(questions_of([record(*turns, Turn("assistant", "y"), images=("a.png", "b.png"))]))
    texts = [question.record.turns[0].text for question in asked]
    assert texts == [f"{PICTURE}\n{PICTURE}\nthis?", f"{PICTURE}\n{PICTURE}\nand  that?"]
    assert all(question.record.images == ("a.png", "b.png") for question in asked)


def test_a_picture_inside_its_question_stays_there() -> None:
    turn = Turn("user", f"what is {PICTURE} ?")
    (asked,) = questions_of([record(turn, Turn("assistant", "x"))])
    assert asked.record.turns[0] == turn


def test_a_question_without_an_answer_is_not_asked() -> None:
    assert list(questions_of([record(Turn("user", "why?"), images=())])) == []
