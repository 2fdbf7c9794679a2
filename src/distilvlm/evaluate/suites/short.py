"""GQA, and answers that must be the same string but for case and a full stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.questions import Asked, Question
from distilvlm.evaluate.suites.suite import Sources, content, field_of, gathered


def plain(prediction: str) -> str:
    """As LLaVA-1.5 hands answers to GQA's script: lower case, no full stop at the end."""
    return prediction.rstrip(".").lower()


def judge(question: Question, prediction: str) -> Mapping[str, Any]:
    right = plain(prediction) == question.answer
    kind = question.meta.get("structural")
    told = {"kind": kind, "semantic": question.meta.get("semantic")} if kind else {}
    return {"right": right, "verdict": "right" if right else "wrong", **told}


def _right(one: Answered) -> tuple[float, float]:
    return one.details["right"], 1


def _of(open_question: bool, one: Answered) -> tuple[float, float]:
    counts = (one.details.get("kind") == "query") == open_question
    return one.details["right"] * counts, counts


FIGURES = (
    Figure("accuracy", "accuracy", _right, about="The true answer, but for case and a full stop at the end."),
    Figure(
        "binary",
        "binary",
        lambda one: _of(False, one),
        about="Of questions whose structure is not “query”: answered by yes, no, or one of two things named.",
    ),
    Figure("open", "open", lambda one: _of(True, one), about="Of questions whose structure is “query”."),
)

GQA = Measure("gqa", FIGURES, judge, category="kind", categories=("query", "verify", "logical", "choose", "compare"))


def read_gqa(where: Sources) -> Asked:
    """{split}_questions.json (identity → imageId, question, answer, types); pictures below images/.

    Of a file of all questions only the balanced ones count, as in GQA's script.
    """
    file = where.file("questions", f"{where.split}_questions.json", f"questions/{where.split}_questions.json")

    def question(number: int, row: Mapping[str, Any]) -> Question | None:
        if row.get("isBalanced") is False:
            return None
        name = f"{field_of(row, 'imageId')}.jpg"
        types = row.get("types", {})
        return Question.of(
            (file, number),
            str(row["id"]),
            (where.picture(f"images/{name}", name),),
            where.asked(question=field_of(row, "question")),
            str(field_of(row, "answer")),
            {"structural": types.get("structural"), "semantic": types.get("semantic")},
        )

    rows = ({"id": identity, **row} for identity, row in content(file).items())
    return gathered(file, enumerate(rows), question)
