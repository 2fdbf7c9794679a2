"""Boxed pictures as conversations: where things are, which there are, how many; and what is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from distilvlm.data.boxes import REFERRING, Box, written
from distilvlm.data.convert.absent import Absences, Negatives, by_hash
from distilvlm.data.convert.boxes import Boxed
from distilvlm.data.convert.items import Item, asked, filled
from distilvlm.data.convert.naming import article, sentence
from distilvlm.data.problems import DataError

Task = Literal["detect", "grounding", "list", "count", "caption", "presence", "pairs"]

QUESTIONS: dict[str, str] = {
    "detect": "Locate every {thing}.",
    "grounding": REFERRING.format(expression="the {thing}"),
    "list": "Which things are in this picture?",
    "count": "Count every {thing}.",
    "caption": "Describe this picture.",
    "presence": "Is there {a} {thing} in the picture?",
}
ABSENT: dict[str, str] = {"detect": "none", "list": "none", "count": "0"}
"""What is answered about things that are not there."""

DRAWN = ("presence", "pairs")
"""Tasks that ask about absent things of their own accord."""

CHANGED = 3
"""One thing in so many (at least one) of a rejected caption is wrong."""


@dataclass(frozen=True)
class Asking:
    """What is asked about boxed pictures.

    Args:
        task: "detect" (one question per thing, answered by its boxes), "grounding" (the same, asked as LLaVA-1.5 asks
            for "the dog", only of things that a picture shows once), "list" (one per picture), "count"; "caption" (a
            sentence that names what is there), "presence" (yes or no: every thing that is there and as many that are
            not, as POPE polls) or "pairs" (both of these with a true and a false answer, as preferences).
        question: with {thing} and {a}, its article, except for "list" and "caption"; default: QUESTIONS. "pairs" asks
            the default ones.
        absent: ask about so many things, too, that are not in the picture (a choice by its name). Pictures without
            objects give rows only then. Of detect, list and count.
        decimals: of a box.
        negatives: how absent things are chosen, of presence and pairs: see `absent.Absences`.
        rated: whether pairs become two rated answers each.

    Raises:
        DataError: no such task, an option that the task does not have, or numbers out of range.
    """

    task: str = "detect"
    question: str | None = None
    absent: int = 0
    decimals: int = 2
    negatives: Negatives = "random"
    rated: bool = False

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise DataError(f"task: {self.task!r} is none of {', '.join(get_args(Task))}")
        if self.negatives not in get_args(Negatives):
            raise DataError(f"negatives: {self.negatives!r} is none of {', '.join(get_args(Negatives))}")
        if self.absent < 0 or not 1 <= self.decimals <= 6:
            raise DataError("absent must not be negative, decimals from 1 to 6")
        for option, has_it in (
            ("absent", not self.absent or self.task in ABSENT),
            ("negatives", self.negatives == "random" or self.task in DRAWN),
            ("rated", not self.rated or self.task == "pairs"),
            ("question", self.question is None or self.task != "pairs"),
        ):
            if not has_it:
                raise DataError(f"{option}: task {self.task} has no such option; leave it out")

    def items(self, pictures: Sequence[Boxed], names: Sequence[str], left_out: Counter[str]) -> Iterator[Item]:
        """Rows for every picture, of the things `names`; pictures that give none are counted in `left_out`."""
        absences = Absences(pictures, names, self.negatives)
        for picture in pictures:
            if not picture.things and not self.absent:
                left_out["pictures without objects"] += 1
                continue
            if self.task == "list":
                yield self._list(picture)
            elif self.task == "caption":
                yield self._caption(picture)
            elif self.task == "grounding":
                for thing, number in picture.counts.items():
                    if number == 1:
                        yield self._about(picture, thing)
                    else:
                        left_out["things that a picture shows several times"] += 1
            elif self.task == "presence":
                for thing in self._polled(picture, absences, left_out):
                    yield self._presence(picture, thing)
            elif self.task == "pairs":
                yield from self._pairs(picture, absences, left_out)
            else:
                there = list(dict.fromkeys(name for name, _ in picture.things))
                others = by_hash(picture, [name for name in names if name not in there])
                for name in [*there, *others[: self.absent]]:
                    yield self._about(picture, name)

    def _list(self, picture: Boxed) -> Item:
        told = ", ".join(sorted(picture.counts)) or ABSENT["list"]
        return self._item(picture, picture.image, "list", told, _things(picture))

    def _about(self, picture: Boxed, name: str) -> Item:
        boxes = sorted(box for other, box in picture.things if other == name)
        meta = {"thing": name, "boxes": _pixels(boxes), "size": list(picture.size)}
        if self.task == "count":
            answer = str(len(boxes))
        else:
            answer = "; ".join(written(box, picture.size, self.decimals) for box in boxes) or ABSENT[self.task]
        return self._item(picture, f"{picture.image}:{name}", self.task, answer, meta, name)

    def _caption(self, picture: Boxed) -> Item:
        return self._item(picture, picture.image, "caption", sentence(picture.counts), _things(picture))

    def _polled(self, picture: Boxed, absences: Absences, left_out: Counter[str]) -> list[str]:
        """What is there and as much that is not, in an order that does not tell which: as turns of one conversation,
        "yes, no, yes, no" would be learned instead of looking."""
        there = list(picture.counts)
        others = absences.of(picture, len(there))
        if len(others) < len(there):
            left_out["absent things to ask about: the data set has no further names"] += len(there) - len(others)
        return by_hash(picture, [*there, *others], ":asked")

    def _presence(self, picture: Boxed, thing: str) -> Item:
        there = thing in picture.counts
        meta = {"thing": thing, "there": there, "how": self.negatives, **_things(picture)}
        return self._item(picture, f"{picture.image}:{thing}", "presence", "yes" if there else "no", meta, thing)

    def _pairs(self, picture: Boxed, absences: Absences, left_out: Counter[str]) -> Iterator[Item]:
        """The caption against one with wrong things for some of its own, and against one with further, wrong things;
        and every presence question with its right and its wrong answer."""
        there = picture.counts
        number = max(1, len(there) // CHANGED)
        others = absences.of(picture, 2 * number)
        replaced = dict(zip(by_hash(picture, there, ":replaced")[:number], others, strict=False))
        if others:
            swapped = {replaced.get(name, name): count for name, count in there.items()}
            yield self._false_caption(picture, "replaced", swapped)
            yield self._false_caption(picture, "extended", {**there, **dict.fromkeys(others[-number:], 1)})
        for thing in self._polled(picture, absences, left_out):
            true = self._presence(picture, thing)
            yield self._against(true, "no" if true.meta["there"] else "yes", f"{picture.image}:presence:{thing}", {})

    def _false_caption(self, picture: Boxed, changed: str, told: Mapping[str, int]) -> Item:
        wrong = [name for name in told if name not in picture.counts]
        meta = {"changed": changed, "absent": wrong, "how": self.negatives}
        return self._against(self._caption(picture), sentence(told), f"{picture.image}:caption:{changed}", meta)

    def _against(self, true: Item, answer: str, id: str, more: Mapping[str, Any]) -> Item:
        """A pair of a true answer and a false one."""
        about = {"task": "pairs", "about": true.meta["task"]}
        meta = {**about, **{key: value for key, value in true.meta.items() if key != "task"}, **more}
        return replace(true, id=id, other=asked(true.turns[0].text, answer), fields=meta, meta=meta)

    def _item(self, picture: Boxed, id: str, task: str, answer: str, told: Mapping[str, Any], thing: str = "") -> Item:
        question = QUESTIONS[task] if self.question is None else self.question
        known = {"thing": thing, "a": article(thing)} if thing else {}
        meta = {"task": task, **told}
        turns = asked(filled(question, known, "question"), answer)
        return Item(picture.file, None, id, (picture.image,), turns, meta, meta)


def _things(picture: Boxed) -> dict[str, Any]:
    return {"things": dict(sorted(picture.counts.items()))}


def _pixels(boxes: Sequence[Box]) -> list[list[float]]:
    return [[round(value, 2) for value in box] for box in boxes]
