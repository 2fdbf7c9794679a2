"""MMHal-Bench's figures (Sun et al. 2023, arXiv 2309.14525), of whatever a judge said: hallucination rate and score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distilvlm.evaluate.hallucination.captions import Finder
from distilvlm.evaluate.hallucination.judges import Case, Judgement
from distilvlm.evaluate.hallucination.synonyms import Mention, Synonyms
from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.questions import Question


def _is(one: Answered, value: bool | None) -> int:
    return int(one.details["hallucinated"] is value)


FIGURES = (
    Figure(
        "hallucination_rate",
        "hallucination rate",
        lambda one: (_is(one, True), _is(one, True) + _is(one, False)),
        better="lower",
        about="Of all answers that the judge could decide on, the share that hallucinates (rated below 3).",
    ),
    Figure(
        "score",
        "score (0 to 6)",
        lambda one: (one.details["rating"] or 0, one.details["rating"] is not None),
        about="Mean rating of all answers that the judge rated.",
        percent=False,
    ),
    Figure(
        "undecided",
        "undecided",
        lambda one: (_is(one, None), 1),
        better="lower",
        about="Answers that the judge could not decide on; the benchmark's script rates those 0.",
        headline=False,
    ),
)


def ratings(cases: Sequence[Case], judgements: Sequence[Judgement]) -> Measure:
    """The measure of judged answers; it also tells types of question apart."""
    found = {case.place: judgement for case, judgement in zip(cases, judgements, strict=True)}

    def judge(question: Question, prediction: str) -> Mapping[str, Any]:
        said = found[question.place]
        words = {True: "hallucinates", False: "no hallucination", None: "undecided"}[said.hallucinated]
        details = {
            "rating": said.rating,
            "hallucinated": said.hallucinated,
            "why": said.text,
            "right": said.hallucinated is False,
            "verdict": words if said.rating is None else f"{words} ({said.rating})",
        }
        return details | {key: question.meta[key] for key in ("question_type",) if key in question.meta}

    return Measure("ratings", FIGURES, judge, category="question_type")


def named_by(cases: Sequence[Case], judgements: Sequence[Judgement], synonyms: Synonyms) -> Finder:
    """Mentions as a judge found them: each of its words as the object that the synonyms make of it, if any."""
    found = {case.place: judgement.objects for case, judgement in zip(cases, judgements, strict=True)}

    def find(question: Question, prediction: str) -> list[Mention] | None:
        objects = found[question.place]
        return None if objects is None else [one for text in objects for one in synonyms.mentions(text)]

    return find
