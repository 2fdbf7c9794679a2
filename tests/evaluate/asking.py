"""Questions without files, for measures."""

from __future__ import annotations

from typing import Any

from distilvlm.data.batch import SampleKey
from distilvlm.data.records import PICTURE, Record, Turn
from distilvlm.evaluate.questions import Question


def question(
    row: int, answer: str = "", text: str = "Describe it.", picture: str | None = None, **meta: Any
) -> Question:
    """Question `row` about `picture` (default: one of its own)."""
    turns = (Turn("user", f"{PICTURE}\n{text}"), Turn("assistant", answer))
    key = SampleKey("test", "test.jsonl", row)
    return Question(Record(key, str(row), (picture or f"{row}.jpg",), turns), 0, meta)
