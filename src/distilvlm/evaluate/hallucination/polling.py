"""Polling for objects (POPE, arXiv 2305.10355): "Is there a dog in the image?", answered yes or no; "yes" is positive.

An answer is read by the rule of POPE's own script: in the first sentence without commas, split at spaces, "No", "not"
or "no" makes a no, everything else a yes. So "Sure thing" is a yes, "NO" and "no!" are, too, and a model that
babbles scores like one that always says yes. Hence:

* An answer that is a yes without saying "yes" is counted as **unclear**, and as the yes that POPE sees in it.
* An answer **without a word** is neither yes nor no, and wrong. That is a departure: the script reads a yes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from distilvlm.data.problems import DataError
from distilvlm.evaluate.baselines import question_only
from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.questions import Question

Said = Literal["yes", "no"]

CATEGORIES = ("random", "popular", "adversarial")
"""How the absent things were chosen: by chance, the most common ones, those that most often come with what is there."""

NEGATIONS = frozenset({"No", "not", "no"})
_WORD = re.compile(r"[^\W_]+")


def said(text: str) -> Said | None:
    """What an answer says by POPE's rule; None where there is no word in it."""
    if not _WORD.search(text):
        return None
    words = _first_sentence(text).replace(",", "").split(" ")
    return "no" if NEGATIONS & {*words} else "yes"


def is_unclear(text: str) -> bool:
    """Whether an answer is a yes by that rule without saying "yes"."""
    return said(text) == "yes" and "yes" not in _WORD.findall(_first_sentence(text).lower())


def _first_sentence(text: str) -> str:
    return text.split(".")[0]


def judge(question: Question, prediction: str) -> Mapping[str, Any]:
    """Raises DataError where the true answer is neither yes nor no."""
    truth = question.answer.strip().lower()
    if truth not in ("yes", "no"):
        key = question.record.key
        raise DataError(
            f"{key.file}, row {key.row}: the answer is {question.answer!r}; polling questions are answered by yes or no"
        )
    found = said(prediction)
    unclear = is_unclear(prediction)
    right = found == truth
    verdict = "no answer" if found is None else ("right" if right else "wrong") + (", but unclear" if unclear else "")
    details: dict[str, Any] = {"truth": truth, "said": found, "unclear": unclear, "right": right, "verdict": verdict}
    return details | {key: question.meta[key] for key in ("how", "thing") if question.meta.get(key) is not None}


def _counted(*pairs: tuple[Said, Said | None]) -> Callable[[Answered], int]:
    """1 for an answer whose truth and reading are one of the pairs."""
    return lambda one: int((one.details["truth"], one.details["said"]) in pairs)


_true_yes, _true_no = _counted(("yes", "yes")), _counted(("no", "no"))
_said_yes = _counted(("yes", "yes"), ("no", "yes"))
_there = _counted(("yes", "yes"), ("yes", "no"), ("yes", None))

FIGURES = (
    Figure(
        "f1",
        "F1",
        lambda one: (2 * _true_yes(one), _said_yes(one) + _there(one)),
        about="Of “yes”: the harmonic mean of precision and recall. Always saying yes has one, too.",
    ),
    Figure("accuracy", "accuracy", lambda one: (_true_yes(one) + _true_no(one), 1), about="Right answers of all."),
    Figure(
        "yes_ratio",
        "yes-ratio",
        lambda one: (_said_yes(one), 1),
        better="neither",
        about="How often a model says yes; the true answers' own share of yes would be right.",
    ),
    Figure(
        "precision",
        "precision",
        lambda one: (_true_yes(one), _said_yes(one)),
        about="Of all that a model says is there, the share that is; undefined where it never says yes.",
        headline=False,
    ),
    Figure(
        "recall",
        "recall",
        lambda one: (_true_yes(one), _there(one)),
        about="Of all that is there, the share to which a model says yes.",
        headline=False,
    ),
    Figure(
        "unclear",
        "unclear",
        lambda one: (one.details["unclear"], 1),
        better="lower",
        about="Counted as yes, as POPE does, only because they say no “no”.",
        headline=False,
    ),
    Figure(
        "empty",
        "empty",
        lambda one: (one.details["said"] is None, 1),
        better="lower",
        about="Without a word: neither yes nor no, and wrong.",
        headline=False,
    ),
)

POLLING = Measure("polling", FIGURES, judge, category="how", categories=CATEGORIES)


def blind_answers(
    questions: Sequence[Question], training: Sequence[tuple[str, str]] | None = None
) -> dict[str, list[str]]:
    """Baseline → its answers: always-yes, always-no and, from `training` (question, answer), question-only."""
    found = {f"always-{word}": [word] * len(questions) for word in ("yes", "no")}
    if training is not None:
        guess = question_only(training)
        found["question-only"] = [guess(question.text) for question in questions]
    return found
