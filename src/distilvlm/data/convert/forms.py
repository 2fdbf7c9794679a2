"""A row in LLaVA's form ↔ the same row as OpenAI-style messages. What else a row says stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distilvlm.data.convert.items import IMAGE_TOKEN
from distilvlm.data.markers import neutralise
from distilvlm.data.preferences import PROMPTS, family
from distilvlm.data.problems import RowError
from distilvlm.data.turns import LLAVA_ROLES, MESSAGE_ROLES, address, has_pictures, kind, listed

Row = Mapping[str, Any]

_PLACE = f"{IMAGE_TOKEN}\n"
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


def named(row: Row) -> list[str]:
    """The pictures that a row in LLaVA's form names. Raises `RowError`."""
    key = _picture_key(row)
    if row.get("image") is not None and row.get("images") is not None:
        raise RowError("images", "stands beside 'image': leave the one out that is not meant")
    given = row.get(key)
    names = given if isinstance(given, list) else [] if given is None else [given]
    for name in names:
        if not isinstance(name, str) or not name:
            raise RowError(key, f"is {kind(name)}, not the path of a picture")
    return names


def renamed(row: Row, names: Sequence[str]) -> dict[str, Any]:
    """The row with other names for its pictures."""
    if not names:
        return dict(row)
    key = _picture_key(row)
    return {**row, key: list(names) if isinstance(row.get(key), list) else names[0]}


def talks(row: Row) -> list[str]:
    """The fields of a row in either form that hold its conversation, or both of a pair.

    Raises:
        RowError: it has none, or a prompt beside its answers.
    """
    preferred = family(dict(row))
    if preferred == "pairs":
        found, apart = ["chosen", "rejected"], PROMPTS
    else:
        found = ["messages" if "messages" in row and "conversations" not in row else "conversations"]
        apart = ("completion",) if preferred == "rated" else ()
    for key in found:
        if not isinstance(row.get(key), list) or any(name in row for name in apart):
            raise RowError(
                key,
                f"is {kind(row.get(key))}, not a whole conversation: `distilvlm data convert` has a command for each "
                "form (preference writes whole ones of a prompt and answers)",
            )
    return found


def to_llava(row: Row) -> dict[str, Any]:
    """A row of either form in LLaVA's. A picture's part becomes `<image>` and a newline; speakers are called human, gpt
    and system.

    Raises:
        RowError: it is of neither form, or its sides show different pictures.
    """
    made = dict(row)
    waiting = iter(named(row))
    shown: dict[str, list[str | None]] = {}
    parts = any(has_pictures(_content(turn)) for key in talks(row) for turn in row[key])
    for key in talks(row):
        told = [_llava_turn(turn, where, parts) for where, turn in listed(dict(row), key)]
        made["conversations" if key == "messages" else key] = [turn for turn, _ in told]
        shown[key] = [name for _, names in told for name in names]
    if "messages" in made and "conversations" in made and "conversations" not in row:
        del made["messages"]
    if not parts:
        return made
    first, *others = shown.values()
    if any(other != first for other in others):
        raise RowError("rejected", "shows other pictures than chosen: both must show the same, in order")
    names = [taken for name in first if (taken := next(waiting, None) if name is None else name) is not None]
    if len(names) < len(first) or next(waiting, None) is not None:
        raise RowError(
            _picture_key(row), f"holds another number of pictures than the {len(first)} parts that name none"
        )
    made.pop("images", None)
    return {**made, "image": names[0] if len(names) == 1 else names}


def to_messages(row: Row) -> dict[str, Any]:
    """A row of either form as messages, which `to_llava` gives back as it was.

    Pictures are parts (`image_url`) in front of the text where it says `<image>` and a newline. Where a text has them
    elsewhere, parts could not be told from it again, or training would read them otherwise: it then keeps its `<image>`
    and the row its `image`, which readers of messages take, too.

    Raises:
        RowError: it is of neither form.
    """
    row = to_llava(row)
    made = _messages(row, iter(()))
    names = named(row)
    if not names or not all(_is_usual(row[key], len(names)) for key in talks(row)):
        return made
    rest = {key: value for key, value in row.items() if key not in ("image", "images")}
    with_parts = _messages(rest, iter(names * len(talks(row))))
    return with_parts if to_llava(with_parts) == row else made


def _messages(row: Row, names: Iterator[str]) -> dict[str, Any]:
    """With parts for as many pictures as there are names."""
    made: dict[str, Any] = {}
    for key, value in row.items():
        if key in talks(row):
            value = [_message(turn, names) for turn in value]
        made["messages" if key == "conversations" else key] = value
    return made


def _message(turn: Row, names: Iterator[str]) -> dict[str, Any]:
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role, text = LLAVA_ROLES[turn["from"]], turn["value"]
    parts: list[dict[str, Any]] = []
    while role == "user" and text.startswith(_PLACE) and (name := next(names, None)) is not None:
        parts.append({"type": "image_url", "image_url": {"url": name}})
        text = text.removeprefix(_PLACE)
    if parts and text:
        parts.append({"type": "text", "text": text})
    return {"role": role, "content": parts or text, **rest}


def _is_usual(turns: Sequence[Row], pictures: int) -> bool:
    """Whether every picture stands on a line of its own in front of a question, and reading would not move or trim
    anything (`markers.place` does, of a single picture)."""
    asked = [turn["value"] for turn in turns if LLAVA_ROLES[turn["from"]] == "user"]
    behind = [text.removeprefix(_PLACE * text.count(_PLACE)) for text in asked]
    if sum(text.count(IMAGE_TOKEN) for text in asked) != pictures or any(IMAGE_TOKEN in text for text in behind):
        return False
    shows = [text for text, before in zip(behind, asked, strict=True) if text != before]
    return pictures > 1 or all(text and text == text.strip() for text in shows)


def _llava_turn(turn: Any, where: str, parts: bool) -> tuple[dict[str, Any], list[str | None]]:
    """The turn, and for each of its pictures' parts what it names. With `parts` anywhere in the row, an `<image>` in a
    question was typed."""
    if not isinstance(turn, Mapping):
        raise RowError(where, f"is {kind(turn)}, not an object")
    is_llava = "from" in turn
    speaker = turn.get("from" if is_llava else "role")
    role = (LLAVA_ROLES if is_llava else MESSAGE_ROLES).get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"{where}.{'from' if is_llava else 'role'}", f"is {speaker!r}; known are {', '.join(_SPEAKERS)}")
    content = _content(turn)
    field = f"{where}.{'value' if is_llava else 'content'}"
    if not isinstance(content, str) and (is_llava or not isinstance(content, list)):
        raise RowError(field, f"is {kind(content)}, not text")
    shown: list[str | None] = []
    text = ""
    for place, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
        inner = field if isinstance(content, str) else f"{field}[{place}]"
        form = part.get("type") if isinstance(part, Mapping) else None
        if form == "text" and isinstance(part.get("text"), str):
            text += neutralise(part["text"], inner)[0] if parts and role == "user" else part["text"]
        elif form in ("image", "image_url") and role == "user":
            name = address(part)
            if name is not None and not isinstance(name, str):
                raise RowError(inner, f"names {kind(name)}, not a picture")
            shown.append(name)
            text += _PLACE
        else:
            raise RowError(inner, f"is {form!r} in the turn of the {role}: text is expected, of the user pictures, too")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    return {"from": _SPEAKERS[role], "value": text, **rest}, shown


def _content(turn: Any) -> Any:
    return turn.get("value" if "from" in turn else "content") if isinstance(turn, Mapping) else None


def _picture_key(row: Row) -> str:
    return "image" if row.get("images") is None else "images"
