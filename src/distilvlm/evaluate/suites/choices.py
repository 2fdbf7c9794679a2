"""Multiple choice that a model answers in words: which option an answer means, by the rule of each benchmark's authors.

A rule maps an answer and the options (letter → text, in order) to a letter, or to None where it can't tell: such an
answer is wrong, and counted as unreadable.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.questions import Question

LETTERS = "ABCDEFGHIJ"

Rule = Callable[[str, Mapping[str, str]], str | None]

Details = Callable[[Question], Mapping[str, Any]]
"""What of a question's `meta` a measure's figures and categories look at."""

_SAID = re.compile(r"The answer is ([A-E])")
_MARKS = str.maketrans({mark: " " for mark in ".()[],:;!*#{}"})


def lettered(options: Sequence[str]) -> dict[str, str]:
    return dict(zip(LETTERS, options, strict=False))


def lines(options: Mapping[str, str], form: str = "{letter}. {text}") -> str:
    """Options as a prompt shows them, a line each."""
    return "\n".join(form.format(letter=letter, text=text) for letter, text in options.items())


def by_letter(prediction: str, options: Mapping[str, str]) -> str | None:
    """LLaVA's rule for ScienceQA: the letter alone, "B. ..." at the beginning, or "The answer is B". ("B." is not read:
    nothing follows the full stop, which their rule wants.)"""
    text = prediction.replace("\n", ". ")
    if text.strip() in {*LETTERS[:5]}:
        found: str | None = text.strip()
    elif text[:1] in {*LETTERS[:5]} and text[1:3] == ". ":
        found = text[0]
    else:
        said = _SAID.search(text)
        found = said.group(1) if said else None
    return found if found in options else None


def by_letter_or_text(prediction: str, options: Mapping[str, str]) -> str | None:
    """The rule that MMBench's toolkit (VLMEvalKit) applies before it asks a language model.

    The only letter among the words, punctuation aside; an A among more than three words may be an article and settles
    nothing. Else the only option whose text stands in the answer.
    """
    said = prediction.translate(_MARKS).split()
    letters = [letter for letter in options if letter in said]
    if len(letters) == 1:
        if "A" not in said or len(said) <= 3:
            return letters[0]
    elif not letters and "Z" in said:
        return None  # how their prompts call none of the options
    texts = [letter for letter, text in options.items() if text.lower() in prediction.lower()]
    return texts[0] if len(texts) == 1 else None


def last_named(prediction: str, options: Mapping[str, str]) -> str | None:
    """MMMU's rule, up to where it guesses: the last "(B)"; else the last B between spaces; else, in an answer of more
    than five words, the option whose text comes last."""
    text = prediction
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in options}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.__getitem__)
    if len(text.split()) > 5:
        places = {letter: text.lower().rfind(told.lower()) for letter, told in options.items()}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.__getitem__)
    return None


def guess(question: Question, options: Mapping[str, str]) -> str:
    """MMMU's script draws an option where it can read none. So do we, by a draw that is the question's own: their one
    series of draws changes with the order of the questions."""
    return random.Random(question.record.id).choice(list(options))


def chosen(question: Question, prediction: str, rule: Rule) -> dict[str, Any]:
    """What a multiple-choice answer is worth, as details; `meta.options` are the letters and their texts."""
    found = rule(prediction, question.meta["options"])
    right = found == question.answer
    verdict = "unreadable" if found is None else "right" if right else "wrong"
    return {"truth": question.answer, "chosen": found, "right": right, "verdict": verdict}


ACCURACY = Figure(
    "accuracy",
    "accuracy",
    lambda one: (one.details["right"], 1),
    about="Answers that name the right option; one that names none is wrong.",
)
UNREADABLE = Figure(
    "unreadable",
    "unreadable",
    lambda one: (one.details["chosen"] is None, 1),
    better="lower",
    about="Answers of which the rule can't tell which option they mean.",
    headline=False,
)


def choice(rule: Rule, name: str, figures: Sequence[Figure] = (), details: Details | None = None) -> Measure:
    """The measure of multiple choice by a rule.

    Args:
        figures: more of them.
        details: what else of a question is kept; its "category" tells questions apart.
    """

    def judge(question: Question, prediction: str) -> Mapping[str, Any]:
        return {**chosen(question, prediction, rule), **({} if details is None else details(question))}

    return Measure(name, (ACCURACY, *figures, UNREADABLE), judge, category="category")


def share_of(detail: str, value: Any = True) -> Callable[[Answered], tuple[float, float]]:
    """Parts of the accuracy on answers whose detail has that value."""

    def parts(one: Answered) -> tuple[float, float]:
        counts = one.details.get(detail) == value
        return one.details["right"] * counts, counts

    return parts
