"""Splitting rows by picture: no picture, by content, is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from distilvlm.data.convert.items import Item


def held_out(items: Sequence[Item], share: float, seed: int, digest: Callable[[str], str]) -> list[bool]:
    """Whether each item goes to the test file.

    Where a picture goes is a function of its content and `seed` alone: two files made of the same pictures (open and
    closed questions, say) are split alike, and a picture that is added moves no other. The price is that `share` is met
    on average only. Pictures that stand together in a row go together, and a row of text goes by its text (a preference
    by its prompt: both answers to it stay on one side).

    Args:
        share: of the pictures, 0 to 1.
        digest: content of a picture, hexadecimal.
    """
    groups = _Groups()
    contents: list[list[str]] = []
    for item in items:
        own = [digest(name) for name in item.images] or [_of_text(item)]
        contents.append(own)
        for other in own[1:]:
            groups.join(own[0], other)
    return [drawn(groups.of(own[0]), seed) < share for own in contents]


def _of_text(item: Item) -> str:
    turns = item.turns if item.preferences is None else item.turns[:-1]
    return hashlib.sha256("\0".join(turn.text for turn in turns).encode("utf-8", "replace")).hexdigest()


def drawn(content: str, seed: int) -> float:
    """A number in [0, 1) out of content and seed."""
    digest = hashlib.sha256(f"{seed}:{content}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class _Groups:
    """Contents that must stay together (union-find); the smallest names its group, whatever the order of rows."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def of(self, content: str) -> str:
        while (parent := self._parents.get(content, content)) != content:
            self._parents[content] = content = self._parents.get(parent, parent)
        return content

    def join(self, one: str, other: str) -> None:
        low, high = sorted((self.of(one), self.of(other)))
        self._parents[high] = low
