"""Rows that can't be used, told by what is wrong with them (how many of a kind, the first ones, what to do), and rows
and pictures that are there twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distilvlm.data.batch import BadRow
from distilvlm.data.contents import Contents
from distilvlm.data.inspection import image_field

SHOWN = 3
"""Rows of a kind that are named."""


@dataclass(frozen=True)
class Kind:
    """Something that can be wrong with a row."""

    name: str
    fix: str
    reason: str  # pattern of the reasons that readers and checks give


KINDS = (
    Kind(
        "missing picture",
        "put the files there, or say where they are: --images, or `images:` in the recipe",
        r"^no file |no such file$|is no member of ",
    ),
    Kind(
        "broken picture",
        "get these files anew, or take their rows out",
        "can't be read as a picture|can't be read: |are no picture",
    ),
    Kind("picture too large", "scale it down", "pixels are more than|is too thin|padded to a square"),
    Kind("empty picture", "get these files anew, or take their rows out", "nothing to see"),
    Kind(
        "picture elsewhere",
        "download pictures; those inside of rows become files by `distilvlm data convert rows SOURCE --to llava`",
        "remote pictures are not fetched|pictures inside the data file",
    ),
    Kind(
        "picture without a name",
        "name every picture in `image`, and a place (`<image>` or a part) for each in a turn of the user",
        "not the path of a picture|names no picture|is not the name of a member|there is no picture"
        "|no bytes of a picture|neither the path nor the bytes",
    ),
    Kind(
        "pictures and their places differ",
        "as many `<image>` in the user's turns (or parts) as pictures; nobody else shows any",
        "<image> markers for|more than the messages have places for|only the user shows pictures|unexpected picture",
    ),
    Kind(
        "malformed JSON", "mend the line, or write the file anew", "malformed JSON|is cut off|no members of a tar file"
    ),
    Kind(
        "no row of a conversation",
        "`distilvlm data convert` makes rows of what you have",
        "is missing; the row has|not a list of turns|not an object|not a list of parts|is a part of type|, not text"
        "|known roles are|is spoken by|is missing or empty|is no list of turns|is no turn|is no object"
        "|, which no JSON holds|not a whole conversation",
    ),
    Kind("turns out of order", "user and assistant speak by turns, the user first", "roles must alternate"),
    Kind(
        "nothing to learn",
        "give the row an answer with text; where it was cut off, raise the stage's `max_length`",
        "nothing to learn|no answer with text|has no text|ends with its answer",
    ),
    Kind(
        "does not fit",
        "raise the stage's `max_length`, or show fewer pictures in a row",
        "max_length|positions",
    ),
    Kind(
        "preferences that are none",
        "both sides have the same pictures and prompt, and another last answer; a label is true or false",
        "a file holds one kind|both must show the same|only the last answer may differ|nothing to prefer"
        "|not true \\(a good|holds no question|leave one of them out",
    ),
    Kind("broken text", "write the file anew, as UTF-8", "surrogate pair|not UTF-8"),
    Kind(
        "refused by the template",
        "mend the row, or take another `template`",
        "refuses it|drops, repeats or|plain template takes",
    ),
)

OTHER = Kind("other", "as the reason says", "")


@dataclass(frozen=True)
class Defects:
    """All rows with a kind of defect."""

    kind: Kind
    rows: tuple[BadRow, ...]


def kind_of(row: BadRow) -> Kind:
    return next((kind for kind in KINDS if re.search(kind.reason, row.reason)), OTHER)


def grouped(bad: Sequence[BadRow]) -> list[Defects]:
    """Most frequent kind first; rows in their order."""
    found: dict[Kind, list[BadRow]] = {}
    for row in bad:
        found.setdefault(kind_of(row), []).append(row)
    return [Defects(kind, tuple(rows)) for kind, rows in sorted(found.items(), key=lambda one: -len(one[1]))]


SAME_ROW, SAME_PICTURE = "same row", "same picture"


def repeated(contents: Contents) -> Iterator[tuple[str, BadRow]]:
    """(kind, what is there again), in order: a row that says and shows what an earlier one does, or a picture that is
    the same file as an earlier one, told of the row that first shows it."""
    records = contents.source.records
    for first, *others in contents.same_rows():
        row = records[int(first)].key.row
        for other in others:
            yield SAME_ROW, BadRow(records[int(other)].key, "row", f"says and shows what row {row} does")
    for first, *others in contents.same_pictures():
        path = contents.path(int(first))
        for other in others:
            record = records[int(contents.firsts[other, 0])]
            field = image_field(record, int(contents.firsts[other, 1]))
            yield SAME_PICTURE, BadRow(record.key, field, f"{contents.path(int(other))} is the same file as {path}")


def report(bad: Sequence[BadRow], again: Sequence[tuple[str, BadRow]], out: str) -> Iterator[str]:
    """Lines for people.

    Args:
        again: as `repeated` gives it.
        out: where all of them stand, or how to have them.
    """
    more = False
    for one in grouped(bad):
        yield f"{one.kind.name}: {_rows(len(one.rows))}"
        yield from _first(one.rows)
        yield f"  What to do: {one.kind.fix}."
        more |= len(one.rows) > SHOWN
    for kind in (SAME_ROW, SAME_PICTURE):
        if rows := [row for name, row in again if name == kind]:
            yield f"{kind}: {_rows(len(rows))}, which can be used all the same"
            yield from _first(rows)
            more |= len(rows) > SHOWN
    if more:
        yield out


def _first(rows: Sequence[BadRow]) -> Iterator[str]:
    yield from (f"  {row}" for row in rows[:SHOWN])
    if len(rows) > SHOWN:
        yield f"  ... and {len(rows) - SHOWN:,} more"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
