"""docs/errors.md lists every message that the package raises, and a test meets each of them."""

from __future__ import annotations

import re
from collections import Counter

from .met import met, said
from .pages import ROOT
from .raised import Raised, bare, raised, texts

PAGE = ROOT / "docs" / "errors.md"
ENTRY = re.compile(r"^#### (`+) ?(.+?) ?\1$\n\n(.+)$", re.MULTILINE)


def entries() -> list[tuple[str, str]]:
    """Message and explanation of each entry of the page."""
    return [(bare(message), told) for _, message, told in ENTRY.findall(PAGE.read_text(encoding="utf-8"))]


def listing(found: list[Raised]) -> str:
    return "\n\n".join(f"{one.place}\n#### `{one.template}`\n\nCAUSE. **Fix:** WHAT TO DO." for one in found)


def test_every_message_has_an_entry() -> None:
    known = {message for message, _ in entries()}
    missing = [one for one in raised() if one.known not in known]
    assert not missing, (
        f"{len(missing)} messages are not in docs/errors.md. Add under the section they belong to:\n\n"
        + (listing(missing))
    )


def test_every_entry_is_of_the_source_and_stands_once() -> None:
    known = texts() | {one.known for one in raised()}
    gone = [message for message, _ in entries() if not any(message in text for text in known)]
    assert not gone, "nothing in src/ says what these entries of docs/errors.md say (changed? remove or correct them)"
    twice = [message for message, count in Counter(message for message, _ in entries()).items() if count > 1]
    assert not twice


def test_every_entry_has_a_cause_and_a_fix() -> None:
    assert len(entries()) == PAGE.read_text(encoding="utf-8").count("\n#### ")
    for message, told in entries():
        cause, word, fix = told.partition(" **Fix:** ")
        assert word and len(cause) > 10 and len(fix) > 5 and fix.endswith("."), message


def test_every_message_is_met_by_a_test() -> None:
    found = met(raised())
    unmet = [one for one in raised() if one.known not in found]
    assert not unmet, f"no test compares with {len(unmet)} messages:\n" + "\n".join(
        f"{one.place}: {one.template}" for one in unmet
    )


def test_a_text_is_a_piece_of_a_message_with_values_in_it() -> None:
    parts = ("data ", " has ", " rows: is it whole?")
    assert said("data 'x' has 3 rows", parts) == len("data ") + len(" has ") + len(" rows")
    assert said("has 3 rows: is it", parts) > 0
    assert said("is it whole?", parts) == len("is it whole?")
    other = "data 'x' has 3 lines: is it"
    assert said(other, parts) < len(other) / 2
    assert said("rows: is it whole? no", parts) == 0
