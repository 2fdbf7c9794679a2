"""Text that grows with its tokens: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character yet."""

LONGEST = 3
"""Bytes of a character that is not whole, at most; a tokenizer writes one or as many INCOMPLETE for them."""


class Writer:
    """The text of one answer.

    Args:
        tokenizer: nobody else's while this writes: a fast one may not be changed by one thread and read by another.
        stop: texts that end the answer, none of them empty.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        # Decoded together with what stands before: whether a token begins with a space may depend on that.
        self._begun = 0  # first of the ids that are decoded
        self._border = 0  # the last place where a token ended a character
        self._shown = 0  # characters of those ids that are certain
        self._held = ""  # certain, and perhaps the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain once `token` has come."""
        self._ids.append(token)
        text = self._decoded()
        incomplete = len(text) - len(text.rstrip(INCOMPLETE))
        shown = len(text) - min(incomplete, LONGEST)
        if shown <= self._shown:
            return ""
        new, self._shown = text[self._shown : shown], shown
        if not incomplete:
            self._begun, self._border = self._border, len(self._ids)
            self._shown = len(self._decoded())
        return self._certain(new)

    def rest(self) -> str:
        """What was held back, at the end of an answer that no stop string ended; half a character is left out."""
        text = self._certain(self._decoded().rstrip(INCOMPLETE)[self._shown :])
        held, self._held = self._held, ""
        return text + held

    def alone(self, token: int) -> str:
        """The text of one token by itself; of a special one its name."""
        return self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _decoded(self) -> str:
        ids = self._ids[self._begun :]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _certain(self, text: str) -> str:
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with, at most."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
