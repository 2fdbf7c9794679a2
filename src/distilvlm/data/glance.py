"""What must be known of a row before a run, told without making its record, where the row is of the usual shape.

`turns` says what rows may be and what is made of them; this is a shorter way to a part of the same.
Whatever is not plainly so (a picture that is not there, an `<image>` that may have been typed, roles that do not
alternate) is left to `turns`, which alone says what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from distilvlm.data.preferences import family
from distilvlm.data.records import IMAGE_TOKEN, RESERVED, Role
from distilvlm.data.turns import LLAVA_ROLES, MESSAGE_ROLES, Form, address
from distilvlm.storage import is_inside

# Field of the turns, and in them of the speaker and of what is said; fields of pictures, of which the first counts that
# is there; roles of speakers.
_FIELDS: dict[Form, tuple[str, str, str, tuple[str, str], dict[str, Role]]] = {
    "llava": ("conversations", "from", "value", ("image", "images"), LLAVA_ROLES),
    "messages": ("messages", "role", "content", ("images", "image"), MESSAGE_ROLES),
}

_ODD = re.compile(f"[{RESERVED}\ud800-\udfff]")
"""Characters that are changed in texts, or refused."""


class Glance(NamedTuple):
    """As a `turns.Draft` of the same row has it."""

    words: int
    images: Sequence[str]  # that they are there was not asked
    marker_added: bool
    neutralised: int = 0
    answers_dropped: int = 0


def glance(row: Any, form: Form) -> Glance | None:
    """What a draft of a row without preferences would say; None: only the draft tells."""
    try:
        return _glance(row, form)
    except (LookupError, TypeError, AttributeError):  # a field is missing, or holds something else
        return None


def _glance(row: dict[str, Any], form: Form) -> Glance | None:
    talk, speaker, said, pictures, known = _FIELDS[form]
    turns = row[talk]
    first = _alternate(tuple([known[turn[speaker]] for turn in turns]))
    if type(turns) is not list or first is None or family(row) is not None:
        return None
    given = row.get(pictures[0])
    given = row.get(pictures[1]) if given is None else given
    images = given if type(given) is list else [] if given is None else [given]
    texts = [turn[said] for turn in turns]
    in_parts = False
    if form == "messages" and list in map(type, texts):
        images, texts, in_parts = _of_parts(images, texts)
    whole = "\n".join(texts)
    if not whole.isascii() and _ODD.search(whole):
        return None
    answers = "".join(texts[first + 1 :: 2])
    if not answers or answers.isspace():
        return None
    words, markers, added = len(whole.split()), whole.count(IMAGE_TOKEN), False
    if markers:
        # Those that do not stand in the user's turns were typed.
        if len(images) != markers or IMAGE_TOKEN in answers or (first and IMAGE_TOKEN in texts[0]):
            return None
        if markers == 1 and not in_parts and not _stands_alone(whole):
            return None
    elif images:
        words, added = words + 1, True
        if len(images) > 1:
            return None
    return Glance(words, images, added) if all([_is_path(given) for given in images]) else None


@lru_cache(256)
def _alternate(roles: tuple[Role, ...]) -> int | None:
    """The place of the user's first turn, if user and assistant alternate from there on and only a system's turn stands
    before it."""
    first = 1 if roles[:1] == ("system",) else 0
    due = [("user", "assistant")[place % 2] for place in range(len(roles) - first)]
    return first if [*roles[first:]] == due else None


def _of_parts(apart: list[Any], contents: Sequence[Any]) -> tuple[list[Any], list[str], bool]:
    """The pictures of messages in the order of their places, texts with `<image>` for these, and whether there are any
    such places."""
    waiting = iter(apart)
    images: list[Any] = []
    texts: list[str] = []
    for content in contents:
        parts = [{"type": "text", "text": content}] if type(content) is str else content
        if type(parts) is not list:
            raise TypeError
        text = ""
        for part in parts:
            if part["type"] in ("image", "image_url"):
                given = address(part)
                images.append(next(waiting, None) if given is None else given)
                text += f"{IMAGE_TOKEN}\n"
            elif part["type"] == "text":
                text += part["text"]
            else:
                raise LookupError
        texts.append(text)
    if not images:
        return apart, texts, False
    if [*waiting]:  # more than there are places for
        raise LookupError
    return images, texts, True


def _stands_alone(text: str) -> bool:
    """Whether white space or nothing is on both sides of the marker: else moving it changes the number of words."""
    before, _, after = text.partition(IMAGE_TOKEN)
    return (not before or before[-1].isspace()) and (not after or after[0].isspace())


def _is_path(given: Any) -> bool:
    return type(given) is str and given != "" and (":" not in given[:8] or is_inside(given))
