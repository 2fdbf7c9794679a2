"""Conversations in the shapes that public data sets have, as turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distilvlm.data.convert.items import IMAGE_TOKEN, Turn

FIELDS = ("conversations", "conversation", "messages", "texts")
"""Fields that hold one: of {from, value} (LLaVA), {role, content} (OpenAI) or {user, assistant} (the Cauldron)."""

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


def turns(value: Any, field: str, places: Sequence[str] | None = None) -> tuple[tuple[Turn, ...], list[Any]]:
    """The turns of a conversation; a part that is a picture becomes `<image>` on a line of its own.

    Args:
        places: how errors call each turn; default: by its number in `field`.

    Returns:
        the turns, and for each such part the picture that it names, or None where it only marks the place.

    Raises:
        ValueError: (place, what is wrong).
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(field, "is no list of turns")
    found: list[Turn] = []
    pictures: list[Any] = []
    for position, turn in enumerate(value):
        where = f"{field}[{position}]" if places is None else places[position]
        if not isinstance(turn, Mapping):
            raise ValueError(where, "is no turn with a speaker and a text")
        if "user" in turn and "assistant" in turn:
            found += [Turn("human", str(turn["user"] or "")), Turn("gpt", str(turn["assistant"] or ""))]
            continue
        named, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        speaker = SPEAKERS.get(named) if isinstance(named, str) else None
        if speaker is None:
            raise ValueError(where, f"is spoken by {named!r}; known are {', '.join(SPEAKERS)}")
        found.append(Turn(speaker, text if isinstance(text, str) else _joined(text, where, pictures)))
    return tuple(found), pictures


def _joined(parts: Any, where: str, pictures: list[Any]) -> str:
    if not isinstance(parts, Sequence):
        raise ValueError(where, "has no text")
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            text += f"{IMAGE_TOKEN}\n"
            pictures.append(_named(part))
        else:
            raise ValueError(where, f"has a part of type {kind!r}; known are text and image")
    return text


def _named(part: Mapping[str, Any]) -> Any:
    for key in ("image_url", "image", "path", "url"):
        given = part.get(key)
        if isinstance(given, Mapping) and "url" in given:
            given = given["url"]
        if given is not None:
            return given
    return None
