"""Conversations that are JSON already (LLaVA's, OpenAI's messages): to be filtered, or split by picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distilvlm.data.convert.items import Reading
from distilvlm.data.convert.tables import INSTEAD, Columns, Row, Table, items
from distilvlm.data.preferences import family
from distilvlm.data.problems import DataError
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
    content = table(source)
    columns = columns.found(content.names, source)
    if any(isinstance(row, Mapping) and family(dict(row)) == "rated" for _, _, row in content.rows):
        raise DataError(
            f"{source} holds rated answers (label: true or false), which are no plain conversations: {INSTEAD}"
        )
    return Reading((images or source.parent).absolute(), items(content.rows, columns))


def is_json(source: Path) -> bool:
    return source.suffix in (".json", ".jsonl")


def table(source: Path) -> Table:
    """The rows of a JSON list or JSONL file. Raises `DataError`."""
    every = list(rows(source))
    names = {str(name) for row in every if isinstance(row, Mapping) for name in row}
    found: list[Row] = [
        (str(source), number, row if isinstance(row, (Mapping, MalformedRow)) else None)
        for number, row in enumerate(every)
    ]
    return Table(sorted(names), found)
