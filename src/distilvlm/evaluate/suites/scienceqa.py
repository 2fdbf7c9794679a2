"""ScienceQA (Lu et al. 2022): two to five options, a hint, and for half of the questions a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distilvlm.data.problems import DataError, RowError
from distilvlm.evaluate.measures import Figure
from distilvlm.evaluate.questions import Asked, Question
from distilvlm.evaluate.suites.choices import by_letter, choice, lettered, lines, share_of
from distilvlm.evaluate.suites.suite import Sources, content, field_of, gathered

PROMPT = "{context}\n{question}\n{options}\nAnswer with the option's letter from the given choices directly."
"""{context} is "Context: " and the hint, and nothing where there is no hint."""

LOWER = tuple(f"grade{number}" for number in range(1, 7))


def _details(question: Question) -> Mapping[str, Any]:
    return {key: question.meta[key] for key in ("category", "image", "hint", "neither", "lower")}


MEASURE = choice(
    by_letter,
    "scienceqa",
    (
        Figure("image", "with a picture (IMG)", share_of("image"), about="Of questions that have a picture."),
        Figure("text", "with a hint (TXT)", share_of("hint"), headline=False),
        Figure("neither", "with neither (NO)", share_of("neither"), headline=False),
        Figure("lower", "grades 1 to 6", share_of("lower"), headline=False),
        Figure("higher", "grades 7 to 12", share_of("lower", False), headline=False),
    ),
    _details,
)


def read(where: Sources) -> Asked:
    """problems.json and pid_splits.json; pictures {split}/{number}/image.png, also below images/."""
    file = where.file("questions", "problems.json")
    problems, splits = content(file), content(where.file("splits", "pid_splits.json"))
    if where.split not in splits:
        raise DataError(f"{file.with_name('pid_splits.json')} has no split '{where.split}', only {', '.join(splits)}")

    def question(number: int, row: Mapping[str, Any]) -> Question:
        options = lettered(field_of(row, "choices"))
        right = field_of(row, "answer")
        if not isinstance(right, int) or not 0 <= right < len(options):
            raise RowError("answer", f"{right!r} is no number of the {len(options)} choices")
        name = row.get("image")
        path = f"{row.get('split', where.split)}/{row['id']}/{name}"
        pictures = (where.picture(f"images/{path}", path),) if name else ()
        hint = str(row.get("hint") or "").strip()
        asked = where.asked(
            context=f"Context: {hint}" if hint else "",
            hint=hint,
            question=field_of(row, "question"),
            options=lines(options),
            lecture=row.get("lecture", ""),
        )
        meta = {
            "options": options,
            "category": row.get("subject"),
            "image": bool(name),
            "hint": bool(hint),
            "neither": not name and not hint,
            "lower": row.get("grade") in LOWER,
        }
        return Question.of((file, number), row["id"], pictures, asked, list(options)[right], meta)

    rows = ({"id": str(identity), **problems.get(str(identity), {})} for identity in splits[where.split])
    return gathered(file, enumerate(rows), question)


def read_with_pictures(where: Sources) -> Asked:
    """The same, questions with a picture only: what the field calls ScienceQA-IMG."""
    asked = read(where)
    return Asked(asked.name, tuple(one for one in asked.questions if one.record.images), asked.bad)
