"""Which messages the tests meet: a text in a test that can only be read as a part of the message.

A test compares what was raised with a text (`pytest.raises(..., match=...)`, `assert "..." in ...`, a case of a
parametrised test). It meets a message if its text, taken for a pattern, is a piece of it: words where the message has
words, anything where it has a value. Of several messages that fit, only those count of which it says most.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from .pages import ROOT
from .raised import GAP, Raised

TESTS = ROOT / "tests"
ELSEWHERE = {"docs", "fuzz", "golden"}
"""Rooms of the tests that compare no message."""

LENGTH = 8
"""Letters in a row that a text must share with a message."""

LONGEST = 400
"""Letters of a text that is compared with a message; longer ones are files."""

NEAREST = 30
"""Messages that share most with a text; only these are looked at letter by letter."""

SHORT = 5
"""Letters of a text that is compared in so many words (`match=`, `in`), if one message alone of its room has them."""


def met(messages: tuple[Raised, ...]) -> dict[str, str]:
    """Each template that a test meets, with the test's file."""
    templates = {one.known for one in messages}
    rooms = {template: {one.room for one in messages if one.known == template} for template in templates}
    grams = defaultdict(set)
    pieces = {template: template.split(GAP) for template in templates}
    for template, parts in pieces.items():
        for gram in {gram for part in parts for gram in _grams(part)}:
            grams[gram].add(template)
    found: dict[str, str] = {}
    for text, file in _texts():
        if len(text) < LENGTH:
            own = {one for one in templates if text in one and file.split("/")[1] in rooms[one]}
            found |= {one: file for one in own if len(own) == 1 and one not in found}
            continue
        shared = Counter(template for gram in _grams(text) if gram in grams for template in grams[gram])
        nearest = sorted(shared, key=lambda one: (-shared[one], one))[:NEAREST]
        told = {template: said(text, tuple(pieces[template])) for template in nearest}
        most = max(told.values(), default=0)
        for template, letters in told.items():
            if letters == most and letters >= LENGTH and 3 * letters >= len(text):
                found.setdefault(template, file)
    return found


def said(text: str, parts: tuple[str, ...]) -> int:
    """How many letters of `text` are the message's own, where `text` is a piece of a message of these parts; else 0."""

    @functools.cache
    def behind(start: int, part: int) -> int:  # `text[start:]` stands behind the whole of `parts[part]`
        if start == len(text):
            return 0
        return -(10**6) if part + 1 == len(parts) else gap(start, part)

    @functools.cache
    def gap(start: int, part: int) -> int:  # it begins in the value behind `parts[part]`
        best, following = 0, parts[part + 1] if part + 1 < len(parts) else None
        if following is None:
            return best
        for place in range(start, len(text)):
            rest = text[place:]
            if following and rest.startswith(following):
                best = max(best, len(following) + behind(place + len(following), part + 1))
            elif following.startswith(rest):
                best = max(best, len(rest))
            elif not following:
                best = max(best, behind(place, part + 1))
        return best

    best = 0
    for number, part in enumerate(parts):
        if text in part:
            return len(text)
        for length in range(min(len(part), len(text)), 0, -1):
            if part.endswith(text[:length]):
                best = max(best, length + behind(length, number))
        if number + 1 < len(parts):
            best = max(best, gap(0, number))
    return best


def _grams(text: str) -> set[str]:
    return {text[at : at + LENGTH] for at in range(len(text) - LENGTH + 1)}


@functools.cache
def _texts() -> tuple[tuple[str, str], ...]:
    """Each text that tests compare with, a pattern in its stretches of plain letters, with the first file."""
    found: dict[str, str] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        if path.relative_to(TESTS).parts[0] not in ELSEWHERE:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for text, least in [
                *((text, LENGTH) for text in _compared(tree)),
                *((text, SHORT) for text in _said(tree)),
            ]:
                for stretch in _stretches(text):
                    if len(stretch) >= least and (least == SHORT or (" " in stretch and len(stretch) < LONGEST)):
                        found.setdefault(stretch, str(path.relative_to(ROOT)))
    return tuple(found.items())


def _compared(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else ".*" for part in node.values)
        else:
            yield from _compared(node)


def _said(tree: ast.AST) -> Iterator[str]:
    """Texts that are there to be compared with a message."""
    for node in ast.walk(tree):
        given = None
        if isinstance(node, ast.keyword) and node.arg == "match":
            given = node.value
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            given = node.left
        if isinstance(given, ast.Constant) and isinstance(given.value, str):
            yield given.value


def _stretches(text: str) -> Iterator[str]:
    for stretch in re.split(r"(?<!\\)(?:\.[*+]\??|\[\^?[^\]]+\][*+]|\\[dws]\+|\||[()^$])|\n", text):
        plain = re.sub(r"\s+", " ", re.sub(r"\\(.)", r"\1", stretch)).strip()
        yield plain
