"""Who says whether an answer hallucinates: a rule, a language model behind an address, or a file of earlier judgements.

A judge is a function from `Case` to `Judgement`; any will do. What a judge can't tell is None, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distilvlm.data.problems import DataError
from distilvlm.data.rows import rows
from distilvlm.evaluate.hallucination.synonyms import Synonyms
from distilvlm.evaluate.questions import Question

RATINGS = range(7)
"""MMHal-Bench's scale: 6 is best; from HALLUCINATES downwards an answer hallucinates."""

HALLUCINATES = 2

_RATING = re.compile(r"rating\W{0,5}(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """An answer to be judged."""

    place: tuple[str, int, int]  # (file, row, turn) of its question
    id: str
    question: str
    contents: tuple[str, ...]  # what annotations say is in the picture
    reference: str  # the true answer; "" where there is none
    answer: str

    @classmethod
    def of(cls, question: Question, answer: str) -> Case:
        contents = question.meta.get("image_content") or list(question.meta.get("things") or ())
        return cls(question.place, question.record.id, question.text, tuple(contents), question.answer, answer)


@dataclass(frozen=True)
class Judgement:
    """What a judge says of an answer."""

    rating: int | None = None  # one of RATINGS
    hallucinated: bool | None = None
    objects: tuple[str, ...] | None = None  # that the answer names, in the answer's or the judge's words
    text: str = ""  # why

    @classmethod
    def of_rating(cls, rating: int | None, text: str = "") -> Judgement:
        return cls(rating, None if rating is None else rating <= HALLUCINATES, None, text)


class Judge(Protocol):
    """Judges one answer. `name` is told beside the figures."""

    @property
    def name(self) -> str: ...

    def __call__(self, case: Case) -> Judgement: ...


@dataclass(frozen=True)
class LocalRule:
    """Objects by a table of words: an answer hallucinates if it names an object that nothing says is there.

    There is what `Case.contents` or the reference answer names. The rule does not see a wrong colour, number, place or
    relation, it can't rate, and it stays undecided about an answer that names no object of the table.
    """

    synonyms: Synonyms

    @property
    def name(self) -> str:
        return f"rule ({self.synonyms.origin})"

    def __call__(self, case: Case) -> Judgement:
        named = self.synonyms.mentions(case.answer)
        told = [*case.contents, case.reference]
        there = {mention.object for text in told for mention in self.synonyms.mentions(text)}
        false = list(dict.fromkeys(mention.object for mention in named if mention.object not in there))
        reason = f"not there: {', '.join(false)}" if false else "names nothing false" if named else "names no object"
        words = tuple(mention.phrase for mention in named)
        return Judgement(None, bool(false) if named else None, words, reason)


def rating_of(text: str) -> Judgement:
    """The rating in a judge's words, "Rating: 4". Of several different ones none counts, as in the benchmark's script
    (which makes that, and a text without a rating, a 0; here it stays undecided and is counted)."""
    found = {int(number) for number in _RATING.findall(text)} & {*RATINGS}
    return Judgement.of_rating(found.pop() if len(found) == 1 else None, text)


class Rated:
    """Judgements made elsewhere, by a person or another program.

    JSON or JSONL, one row per answer: `{"rating": 4}`, `{"hallucinated": true}`, `{"objects": ["dog", "hat"]}`, or a
    judge's words: a text, `{"text": "... Rating: 4"}`, or the completion that MMHal-Bench's script saves. Rows with
    `row`, or with an `id` that questions have once each, are found by it; others must be as many as the answers, in
    their order.
    """

    def __init__(self, path: str | Path, cases: Sequence[Case]) -> None:
        """Raises DataError for a row that judges nothing, and where rows and answers don't fit; names file and row."""
        self._path = Path(path)
        found = list(rows(self._path))
        judgements = [_judgement(value, f"{path}, row {number}") for number, value in enumerate(found)]
        keys = [[_key(value, key) for value in found] for key in ("row", "id")]
        wanted = [[case.place[1] for case in cases], [case.id for case in cases]]
        for given, asked in zip(keys, wanted, strict=True):
            if None not in given and len({*given}) == len(given) and len({*asked}) == len(asked):
                named = dict(zip(given, judgements, strict=True))
                missing = [place for place in asked if place not in named]
                if missing:
                    raise DataError(f"{path} has no judgement for {missing[0]!r} (and {len(missing) - 1} others)")
                self._by_place = {case.place: named[place] for case, place in zip(cases, asked, strict=True)}
                return
        if len(found) != len(cases):
            raise DataError(
                f"{path} has {len(found)} judgements for {len(cases)} answers; name their `row`, or judge all in order"
            )
        self._by_place = {case.place: judgement for case, judgement in zip(cases, judgements, strict=True)}

    @property
    def name(self) -> str:
        return f"judgements of {self._path.name}"

    def __call__(self, case: Case) -> Judgement:
        return self._by_place[case.place]


def _key(value: Any, key: str) -> Any:
    """The `row` or `id` that a judgement names; a saved completion's `id` is its own."""
    if not isinstance(value, Mapping) or value.get(key) is None or "choices" in value:
        return None
    return str(value[key]) if key == "id" else value[key]


def _judgement(value: Any, where: str) -> Judgement:
    if isinstance(value, str):
        return rating_of(value)
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: no judgement; write an object with rating, hallucinated, objects or text")
    if isinstance(choices := value.get("choices"), list) and choices:
        return rating_of(str(choices[0]["message"]["content"]))
    text = str(value.get("text", ""))
    if (rating := value.get("rating")) is not None:
        if isinstance(rating, bool) or rating not in RATINGS:
            raise DataError(f"{where}: rating {rating!r} is not one of 0 to {RATINGS[-1]}")
        return Judgement.of_rating(int(rating), text)
    if isinstance(objects := value.get("objects"), list):
        return Judgement(objects=tuple(map(str, objects)), text=text)
    if isinstance(hallucinated := value.get("hallucinated"), bool):
        return Judgement(hallucinated=hallucinated, text=text)
    if "text" in value:
        return rating_of(text)
    if value.get("rating", 0) is None or value.get("hallucinated", 0) is None:
        return Judgement(text=text)
    raise DataError(f"{where}: no judgement; write rating, hallucinated, objects or text")
