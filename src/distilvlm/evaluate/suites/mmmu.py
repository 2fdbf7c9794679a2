"""MMMU (Yue et al. 2023): exam questions with one to seven pictures, by choice or open, read by the authors' rules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from distilvlm.data.convert.embedded import Store
from distilvlm.data.convert.embedded import pictures as embedded
from distilvlm.data.convert.parquet import table
from distilvlm.data.problems import RowError
from distilvlm.data.records import PICTURE
from distilvlm.data.rows import rows
from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.questions import Asked, Question
from distilvlm.evaluate.suites.choices import ACCURACY, guess, last_named, lettered, lines, share_of
from distilvlm.evaluate.suites.suite import Sources, field_of, gathered

PROMPT = "{question}\n\n{options}\n\n{how}"
"""As the authors asked LLaVA-1.5; {how} is one of the two sentences below, by the kind of question."""
HOW = {
    "multiple-choice": "Answer with the option's letter from the given choices directly.",
    "open": "Answer the question using a single word or phrase.",
}

_PICTURE = re.compile(r"<image (\d+)>")
_GROUPED = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_LEADING = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")

Value = float | str


def values(text: str) -> list[Value]:
    """A text as it is compared: a number, rounded to two places; or in lower case, a single letter with a space before
    or behind it so that it does not fit into any word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def read_open(prediction: str) -> list[Value]:
    """What an answer to an open question may mean: of every line the shortest piece behind one of the words that lead
    to a result (in the last line an equals sign, too), or the whole answer where no line has any; and all numbers
    therein."""
    text = prediction.strip().strip(".").lower()
    parts = text.split("\n")  # their rule for sentences looks for capitals, of which none are left
    pieces: list[str] = []
    for number, part in enumerate(parts):
        leading = (*_LEADING, "=") if number + 1 == len(parts) else _LEADING
        behind = [part.split(word)[-1].strip() for word in leading if word in part]
        # an empty piece gives way to any later one in their loop
        kept = ""
        for piece in behind:
            if not kept or len(piece) < len(kept):
                kept = piece
        if kept and kept not in _TRIVIAL:
            pieces.append(kept)
    pieces = pieces or [text]
    numbers = [found for piece in pieces for form in (_GROUPED, _SCIENTIFIC, _SIMPLE) for found in form.findall(piece)]
    return list(dict.fromkeys(value for piece in [*pieces, *numbers] for value in values(piece)))


def open_right(prediction: str, answers: list[str]) -> bool:
    """Whether a number in the answer is a true one, or a true text stands in it."""
    truths = [value for answer in answers for value in values(answer)]
    texts = [value for value in truths if isinstance(value, str)]
    return any(
        any(text in said for text in texts) if isinstance(said, str) else said in truths
        for said in read_open(prediction)
    )


def judge(question: Question, prediction: str) -> Mapping[str, Any]:
    meta = question.meta
    told = {"category": meta["subject"], "kind": meta["kind"], "guessed": False}
    if meta["kind"] == "open":
        right = open_right(prediction, meta["answers"])
    else:
        found = last_named(prediction, meta["options"])
        told |= {"guessed": found is None, "chosen": found or guess(question, meta["options"])}
        right = told["chosen"] == question.answer
    return {**told, "right": right, "verdict": "right" if right else "wrong"}


def _guessed(one: Answered) -> tuple[float, float]:
    return one.details["guessed"], one.details["kind"] != "open"


MEASURE = Measure(
    "mmmu",
    (
        replace(ACCURACY, about="Right answers of all; where no option can be read, one is drawn, as the authors do."),
        Figure("choice", "multiple choice", share_of("kind", "multiple-choice"), headline=False),
        Figure("open", "open", share_of("kind", "open"), headline=False),
        Figure(
            "guessed",
            "guessed",
            _guessed,
            better="lower",
            about="Multiple choice whose answer was drawn, since none could be read.",
            headline=False,
        ),
    ),
    judge,
    category="category",
)


def read(where: Sources) -> Asked:
    """Parquet files of the hub's MMMU/MMMU, in one folder or one per subject, or JSON with the same fields: id,
    question, options, image_1 to image_7, answer, question_type. Embedded pictures go to pictures/.

    A picture is shown where `<image 1>` stands; a picture that is named nowhere stands before the question.
    """
    store = Store(where.root / where.given.get("pictures", "pictures"))

    def question(number: int, row: Mapping[str, Any]) -> Question:
        identity = str(field_of(row, "id"))
        kind = row.get("question_type", "multiple-choice")
        if kind not in HOW:
            raise RowError("question_type", f"is {kind!r}, neither multiple-choice nor open")
        options = lettered(_list(row.get("options")))
        answers = _list(field_of(row, "answer"))
        if kind != "open" and answers[0] not in options:
            raise RowError("answer", f"is {answers[0]!r}, none of the options' letters: take the split validation")
        shown = lines(options, "({letter}) {text}") if kind != "open" else ""
        asked = where.asked(question=field_of(row, "question"), options=shown, how=HOW[kind])
        text, pictures = _placed(asked, row, store, where)
        meta = {"options": options, "answers": answers, "kind": kind, "subject": _subject(identity)}
        return Question.of((where.root, number), identity, pictures, text, answers[0], meta)

    return gathered(where.root, enumerate(_rows(where)), question)


def _rows(where: Sources) -> Iterator[Any]:
    if where.optional("questions", f"*{where.split}*.json", f"*{where.split}*.jsonl") is not None:
        yield from rows(where.file("questions", f"*{where.split}*.json", f"*{where.split}*.jsonl"))
        return
    named = where.root / where.given["questions"] if "questions" in where.given else where.root
    for _, _, row in table(named, where.split).rows:
        yield row


def _placed(text: str, row: Mapping[str, Any], store: Store, where: Sources) -> tuple[str, list[str]]:
    """The text with marks where pictures stand, and their files in that order."""
    files: dict[str, str] = {}
    for number in range(1, 8):
        try:
            names = embedded(row.get(f"image_{number}"), f"image_{number}", store)
        except ValueError as error:
            raise RowError(*error.args) from None
        for name in names:
            kept = store.directory / name
            files[str(number)] = str(kept) if kept.is_file() else where.picture(name, f"images/{name}")
    named = _PICTURE.findall(text)
    if missing := [number for number in named if number not in files]:
        raise RowError(f"image_{missing[0]}", f"is empty, but the question shows <image {missing[0]}>")
    first = [number for number in files if number not in named]
    front = f"{PICTURE}\n" * len(first)
    return front + _PICTURE.sub(PICTURE, text), [files[number] for number in [*first, *named]]


def _list(value: Any) -> list[str]:
    """A list, also one that is written as Python's text, as the published files have it; a single text is one entry."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise RowError("options", f"can't be read as a list: {value[:80]}") from None
    if value is None:
        return []
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _subject(identity: str) -> str:
    """Of "validation_Art_Theory_7": "Art_Theory"."""
    parts = identity.split("_")
    return "_".join(parts[1:-1]) or identity
