"""Rows of a JSON list or a JSONL file, one at a time, with the place of whatever is malformed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distilvlm.data.problems import DataError

_SPACE = re.compile(r"[ \t\r\n]*")


class MalformedRow:
    """A line of a JSONL file that is not JSON: only this row is lost."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def rows(path: Path) -> Iterator[Any]:
    """The rows of a `.json` list or a `.jsonl` file (told apart by the first character), in order.

    The list is parsed row by row: a whole instruction set as Python objects would take several times the file's size.

    Raises:
        DataError: no such file, not UTF-8, neither a list nor JSONL, or a malformed list (names file and line).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"no data file {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a directory; name the JSON or JSONL file in it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): {error.reason}") from None
    start = _end_of_space(text, 0)
    if start == len(text):
        raise DataError(f"{path} is empty")
    if text[start] == "[":
        yield from _rows_of_list(path, text, start + 1)
    elif text[start] == "{":
        yield from _rows_of_lines(text)
    else:
        raise DataError(f"{path} begins with {text[start]!r}: neither a JSON list nor JSONL of objects")


def _rows_of_list(path: Path, text: str, place: int) -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    place = _end_of_space(text, place)
    closed = text[place : place + 1] == "]"
    count = 0
    while not closed:
        try:
            row, place = decode(text, place)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: row {count} is malformed JSON: {error.msg}") from None
        yield row
        count += 1
        place = _end_of_space(text, place)
        following = text[place : place + 1]
        if following not in {",", "]"}:
            what = "the file ends inside the list; is it cut off?" if not following else "expected ',' or ']'"
            raise DataError(f"{path}, line {_line(text, place)}: malformed JSON after row {count - 1}: {what}")
        closed = following == "]"
        place = _end_of_space(text, place + 1)
    if place != len(text):
        raise DataError(f"{path}, line {_line(text, place)}: something follows the end of the list")


def _rows_of_lines(text: str) -> Iterator[Any]:
    # str.splitlines would also break at U+2028 and the like, which stand unescaped in many JSON strings.
    start, number = 0, 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line, start, number = text[start:end], end + 1, number + 1
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            yield MalformedRow(f"line {number} is malformed JSON at character {error.pos + 1}: {error.msg}")


def _end_of_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1
