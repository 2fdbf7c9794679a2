"""Conversations that are JSON already (LLaVA's, OpenAI's messages): to be filtered, or split by picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from distilvlm.data.convert.items import Reading
from distilvlm.data.convert.tables import Columns, Row, items
from distilvlm.data.rows import MalformedRow, rows


def read(
    source: Path,
    images: Path | None = None,
    *,
    question: str = "{question}",
    answer: str = "{answer}",
    image_field: str | None = None,
    conversation_field: str | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
) -> Reading:
    """Rows of a JSON list or JSONL file; see `tables.Columns` for the fields.

    Args:
        source: the file.
        images: directory of the pictures; default: the file's own.

    Raises:
        DataError: the file can't be read, or a column is not there.
    """
    columns = Columns(image_field, conversation_field, question_field, answer_field, question, answer)
    every = list(rows(source))
    names = {str(name) for row in every if isinstance(row, Mapping) for name in row}
    columns = columns.found(sorted(names), source)

    def found() -> Iterator[Row]:
        for number, row in enumerate(every):
            yield str(source), number, row if isinstance(row, (Mapping, MalformedRow)) else None

    return Reading((images or source.parent).absolute(), items(found(), columns))
