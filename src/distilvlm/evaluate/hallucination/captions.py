"""What captions name that is not there: CHAIR (Rohrbach et al. 2018) and Object HalBench's rates.

* CHAIR_i: of all mentions of objects, the share whose object is not in the picture. A word that comes twice is two.
* CHAIR_s: of all captions, the share that names at least one object that is not there.
* Coverage: of all objects in the pictures, the share that is named (over all pictures together, not per picture).
* Object HalBench's mention level counts a word once per response; its response level leaves out responses that name no
  object at all (`CHAIRi` and `CHAIRs_refine` of its script).

A mention counts whatever is said of it: "there is no dog" names a dog, as in the reference code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distilvlm.data.problems import DataError
from distilvlm.evaluate.hallucination.synonyms import Mention, Synonyms
from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.questions import Question

Finder = Callable[[Question, str], Sequence[Mention] | None]
"""Question and answer → the mentions of objects in the answer; None where nobody knows them."""


def _mentions(one: Answered, of: str = "mentioned") -> int:
    """How often the answer names objects: all, or those that are `hallucinated`."""
    return sum(len(one.details["mentioned"][name]) for name in one.details[of])


def _words(one: Answered, of: str = "mentioned") -> int:
    """The same, a word once."""
    return sum(len({*one.details["mentioned"][name]}) for name in one.details[of])


def _named(one: Answered) -> int:
    """How many of the objects that are there the answer names."""
    return len(one.details["there"]) - len(one.details["missed"])


def _false(one: Answered) -> int:
    return int(bool(one.details["hallucinated"]))


FIGURES = (
    Figure(
        "chair_i",
        "CHAIR_i",
        lambda one: (_mentions(one, "hallucinated"), _mentions(one)),
        better="lower",
        about="Of all mentions of objects, the share whose object is not in the picture.",
    ),
    Figure(
        "chair_s",
        "CHAIR_s",
        lambda one: (_false(one), one.details["known"]),
        better="lower",
        about="Of all captions, the share that names an object that is not in the picture.",
    ),
    Figure(
        "coverage",
        "coverage",
        lambda one: (one.details["known"] * _named(one), one.details["known"] * len(one.details["there"])),
        about="Of all objects in the pictures, the share that the captions name.",
    ),
    Figure(
        "response_rate",
        "hallucination per response",
        lambda one: (_false(one), int(bool(one.details["mentioned"]))),
        better="lower",
        about="Object HalBench: of all responses that name an object, the share that names one that is not there.",
        headline=False,
    ),
    Figure(
        "mention_rate",
        "hallucination per mention",
        lambda one: (_words(one, "hallucinated"), _words(one)),
        better="lower",
        about="Object HalBench: as CHAIR_i, a word counted once per response.",
        headline=False,
    ),
    Figure(
        "length",
        "words per caption",
        lambda one: (len(one.prediction.split()), 1),
        better="neither",
        about="Who says less errs less.",
        percent=False,
        headline=False,
    ),
)


def captions(synonyms: Synonyms, *, references: bool = False, finder: Finder | None = None) -> Measure:
    """The measure of captions, for questions whose `meta` says what is there.

    `meta["things"]` is a mapping from name to count, or a list of names; names are looked up in `synonyms`.

    Args:
        references: objects that the true answer, or one of `meta["captions"]`, names are there, too, as CHAIR has it
            with COCO's captions.
        finder: who finds the mentions; default: `synonyms`, in the words of the answer.

    Judging raises DataError for a question without things, or with one that the synonyms don't have.
    """
    find: Finder = finder or (lambda question, prediction: synonyms.mentions(prediction))

    def judge(question: Question, prediction: str) -> Mapping[str, Any]:
        there = {*synonyms.objects_of(things_of(question))}
        if references:
            told = (question.answer, *question.meta.get("captions", ()))
            there |= {mention.object for text in told for mention in synonyms.mentions(text)}
        found = find(question, prediction)
        mentioned: dict[str, list[str]] = {}
        for mention in found or ():
            mentioned.setdefault(mention.object, []).append(mention.phrase)
        hallucinated = [name for name in mentioned if name not in there]
        verdict = f"not there: {', '.join(hallucinated)}" if hallucinated else "names nothing false"
        return {
            "mentioned": mentioned,  # object → the words for it, in order
            "there": sorted(there),
            "hallucinated": hallucinated,
            "missed": sorted(there - {*mentioned}),
            "known": found is not None,  # whether anybody could tell what the answer names
            "right": found is not None and not hallucinated,
            "verdict": verdict if found is not None else "not judged",
        }

    return Measure("captions", FIGURES, judge)


def things_of(question: Question) -> list[str]:
    """The names of what is in the question's picture. Raises DataError where its row does not say."""
    things = question.meta.get("things")
    if isinstance(things, Mapping):
        return [str(name) for name, count in things.items() if count]
    if isinstance(things, (list, tuple)):
        return [str(name) for name in things]
    key = question.record.key
    raise DataError(
        f"{key.file}, row {key.row}: nothing says what is in its picture: give annotations, or a row with "
        "meta.things = {name: count} (`distilvlm data convert yolo|voc --task list` writes them)"
    )


def default_synonyms(questions: Sequence[Question], more: Sequence[str] = ()) -> Synonyms:
    """A table of the names that the questions' annotations have, and of `more`: each names itself.

    What no picture shows, and `more` does not name, is then no object, and can't be hallucinated.
    """
    return Synonyms.of_names([*more, *sorted({name for question in questions for name in things_of(question)})])
