"""Which `<image>` in a conversation is a picture's place, and which was typed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distilvlm.data.problems import RowError
from distilvlm.data.records import IMAGE_TOKEN, PICTURE, RESERVED, Turn

_RESERVED = re.compile(f"[{RESERVED}]")
_OWN_LINE = re.compile(rf"^[ \t]*{IMAGE_TOKEN}[ \t]*\r?$", re.MULTILINE)
NEUTRAL = "< image >"


def neutralise(text: str, field: str) -> tuple[str, int]:
    """`text` (of `field`) without anything that could be taken for a picture, and how many places were changed.

    Raises:
        RowError: a lone surrogate, which no tokenizer takes.
    """
    if text.isascii() and IMAGE_TOKEN not in text:
        return text, 0
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(field, f"character {error.start} is half of a surrogate pair; write the file anew") from None
    text, reserved = _RESERVED.subn("\ufffd", text)
    typed = text.count(IMAGE_TOKEN)
    return text.replace(IMAGE_TOKEN, NEUTRAL), reserved + typed


def place(turns: Sequence[Turn], pictures: int, field: str, places: Sequence[str]) -> tuple[list[Turn], int, bool]:
    """Find the markers of `pictures` pictures in turns that hold them as the text `<image>` (LLaVA's files).

    Markers stand in user turns. Where there are more `<image>` than pictures, those alone on their line are the
    markers if their number is right; every other one was typed and is neutralised. A single picture's marker is moved
    to the front of its turn, `<image>\\n{question}` (LLaVA's published preprocessing); one that is missing is put there
    in the first user turn.

    Args:
        field: how errors call the conversation.
        places: how they call each turn.

    Returns:
        the turns with PICTURE characters, the number of neutralised places, and whether the marker was missing.

    Raises:
        RowError: the number of markers differs from that of the pictures.
    """
    found = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "user")
    alone = 0
    if found > pictures > 0:
        alone = sum(len(_OWN_LINE.findall(turn.text)) for turn in turns if turn.role == "user")
    added = found == 0 and pictures == 1
    if pictures and not added and pictures not in (found, alone):
        raise RowError(field, f"{found} {IMAGE_TOKEN} markers for {pictures} picture{'s' * (pictures > 1)}")

    placed: list[Turn] = []
    neutralised = 0
    awaited = added
    for turn, where in zip(turns, places, strict=True):
        text, count = (turn.text, 0) if turn.text.isascii() else _RESERVED.subn("\ufffd", turn.text)
        if turn.role == "user" and pictures:
            if found == pictures:
                text = text.replace(IMAGE_TOKEN, PICTURE)
            elif alone == pictures:
                text = _OWN_LINE.sub(PICTURE, text)
            if awaited:
                text, awaited = PICTURE + text, False
            if pictures == 1 and PICTURE in text:
                text = f"{PICTURE}\n{text.replace(PICTURE, '').strip()}".strip()
        cleaned = [neutralise(part, where) for part in text.split(PICTURE)]
        neutralised += count + sum(number for _, number in cleaned)
        placed.append(Turn(turn.role, PICTURE.join(part for part, _ in cleaned)))
    return placed, neutralised, added
