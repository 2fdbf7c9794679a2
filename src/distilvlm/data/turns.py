"""One conversation of a row, in LLaVA's form or in OpenAI's, as turns and pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from distilvlm.data.markers import neutralise, place
from distilvlm.data.problems import RowError
from distilvlm.data.records import PICTURE, Role, Turn
from distilvlm.storage import is_inside

Form = Literal["llava", "messages"]
"""LLaVA's turns of {from, value}, or OpenAI's of {role, content}."""

LLAVA_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LLAVA_ROLES["system"] = "system"
MESSAGE_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}

Placed = Sequence[tuple[str, Any]]
"""The turns of a conversation as they stand in the row, each with its place there, e.g. `conversations[2]`."""


@dataclass
class Draft:
    """What becomes a record."""

    images: list[str]
    turns: list[Turn]
    neutralised: int = 0
    marker_added: bool = False
    answers_dropped: int = 0
    other: list[Turn] = field(default_factory=list)  # of a pair: the rejected conversation
    desirable: bool | None = None  # of a rated answer

    @property
    def words(self) -> int:
        """Of all turns: LLaVA's measure of length for its grouped sampler. Of a pair, words of its longer side: both
        stand in one micro-batch, which is as long as its longest sequence."""
        return max(sum(len(turn.text.split()) for turn in side) for side in (self.turns, self.other))


class NoPictureError(RowError):
    """A picture that is not there."""

    def __init__(self, field: str, path: Path) -> None:
        super().__init__(field, f"no file {path}")
        self.path = path


def conversation(row: dict[str, Any], form: Form, key: str, turns: Placed, root: Path | None) -> Draft:
    """The conversation `turns` about the row's pictures.

    Args:
        key: the field that is named where the conversation as a whole is wrong.
        root: the directory of the pictures; None: whether they are there is not asked.

    Raises:
        RowError: what is wrong with it.
    """
    draft = _llava(row, key, turns, root) if form == "llava" else _messages(row, key, turns, root)
    _check_order(draft, key, [where for where, _ in turns])
    return draft


def listed(row: dict[str, Any], key: str) -> Placed:
    """The turns of a row's field. Raises `RowError`."""
    given = row.get(key)
    if key not in row:
        raise RowError(key, f"is missing; the row has {sorted(map(str, row))}")
    if not isinstance(given, list) or not given:
        raise RowError(key, f"is {kind(given)}, not a list of turns")
    return [(f"{key}[{position}]", turn) for position, turn in enumerate(given)]


def kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    if value is None:
        return "missing"
    if value in ([], "", {}):
        return "empty"
    return {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}[
        type(value)
    ]


def _llava(row: dict[str, Any], key: str, turns: Placed, root: Path | None) -> Draft:
    images = [picture_path(given, name, root) for name, given in _pictures_of(row, ("image", "images"))]
    spoken = [Turn(_role(turn, where, "from", LLAVA_ROLES), _text(turn, where, "value")) for where, turn in turns]
    return _placed(images, spoken, key, turns)


def _messages(row: dict[str, Any], key: str, turns: Placed, root: Path | None) -> Draft:
    apart = [picture_path(given, name, root) for name, given in _pictures_of(row, ("images", "image"))]
    if not any(isinstance(message, dict) and has_pictures(message.get("content")) for _, message in turns):
        return _placed(apart, [_message(message, where, _no_picture)[0] for where, message in turns], key, turns)

    waiting = iter(apart)
    images: list[str] = []

    def take_picture(part: dict[str, Any], where: str) -> None:
        given = address(part)
        path = next(waiting, None) if given is None else picture_path(given, where, root)
        if path is None:
            raise RowError(where, "names no picture, and 'images' has none left")
        images.append(path)

    draft = Draft(images, [])
    for where, message in turns:
        turn, typed = _message(message, where, take_picture, typed_markers=True)
        draft.turns.append(turn)
        draft.neutralised += typed
    left = sum(1 for _ in waiting)
    if left:
        raise RowError("images", f"{left} more than the messages have places for")
    return draft


def _placed(images: list[str], spoken: list[Turn], key: str, turns: Placed) -> Draft:
    placed, neutralised, added = place(spoken, len(images), key, [where for where, _ in turns])
    return Draft(images, placed, neutralised, added)


def _message(
    message: Any, where: str, picture: Callable[[dict[str, Any], str], None], typed_markers: bool = False
) -> tuple[Turn, int]:
    """One message as a turn. An image part becomes PICTURE and a newline; with `typed_markers` any `<image>` in text
    was typed, because the pictures' places are parts."""
    role = _role(message, where, "role", MESSAGE_ROLES)
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RowError(f"{where}.content", f"is {kind(content)}, not text or a list of parts")
    text, typed = "", 0
    for position, part in enumerate(parts):
        inner = f"{where}.content" if isinstance(content, str) else f"{where}.content[{position}]"
        form = part.get("type") if isinstance(part, dict) else None
        if form == "text":
            piece = _text(part, inner, "text")
            if typed_markers:
                piece, count = neutralise(piece, inner)
                typed += count
            text += piece
        elif form in ("image", "image_url"):
            if role != "user":
                raise RowError(inner, f"a picture in the turn of the {role}; only the user shows pictures")
            picture(part, inner)
            text += f"{PICTURE}\n"
        else:
            raise RowError(inner, f"is a part of type {form!r}; known are text, image and image_url")
    return Turn(role, text), typed


def _check_order(draft: Draft, key: str, places: list[str]) -> None:
    turns = draft.turns
    first = 1 if turns and turns[0].role == "system" else 0
    while first < len(turns) and turns[first].role == "assistant":
        del turns[first], places[first]
        draft.answers_dropped += 1
    for position, turn in enumerate(turns[first:], start=first):
        expected = "assistant" if (position - first) % 2 else "user"
        if turn.role != expected:
            raise RowError(
                places[position], f"is the {turn.role}'s where the {expected}'s turn is due: roles must alternate"
            )
    if not any(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise RowError(key, "no answer with text in it: nothing to learn")


def has_pictures(content: Any) -> bool:
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") in ("image", "image_url") for part in content
    )


def _no_picture(part: dict[str, Any], where: str) -> None:
    raise RowError(where, "unexpected picture")


def address(part: dict[str, Any]) -> Any:
    """What an image part names: OpenAI's `image_url: {url}`, or `image` / `path` / `url` as transformers has them."""
    for key in ("image_url", "image", "path", "url"):
        given = part.get(key)
        if isinstance(given, dict):
            given = given.get("url")
        if given is not None:
            return given
    return None


def _pictures_of(row: dict[str, Any], keys: Sequence[str]) -> list[tuple[str, Any]]:
    for key in keys:
        given = row.get(key)
        if isinstance(given, list):
            return [(f"{key}[{position}]", item) for position, item in enumerate(given)]
        if given is not None:
            return [(key, given)]
    return []


def picture_path(given: Any, where: str, root: Path | None) -> str:
    """The path of a picture that exists, relative to `root` where it was given so. Raises `RowError`."""
    if not isinstance(given, str) or not given:
        raise RowError(where, f"is {kind(given)}, not the path of a picture")
    if is_inside(given):  # a shard's, which has been looked at
        return given
    try:
        scheme = urlsplit(given).scheme if ":" in given[:8] else ""
    except ValueError as error:  # half of a bracketed host
        raise RowError(where, f"is no address of a picture: {error}") from None
    if scheme in ("http", "https"):
        raise RowError(where, f"remote pictures are not fetched: download {given} and give its path")
    if scheme == "data":
        raise RowError(where, "pictures inside the data file are not read: write it to a file and give its path")
    path = unquote(urlsplit(given).path) if scheme == "file" else given
    if root is not None and ("\0" in path or not os.path.isfile(root / path)):  # noqa: PTH113 (half of pathlib's time)
        raise NoPictureError(where, root / path)
    return path


def _role(turn: Any, where: str, key: str, roles: dict[str, Role]) -> Role:
    if not isinstance(turn, dict):
        raise RowError(where, f"is {kind(turn)}, not an object")
    given = turn.get(key)
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        raise RowError(f"{where}.{key}", f"is {given!r}; known roles are {', '.join(roles)}")
    return role


def _text(turn: dict[str, Any], where: str, key: str) -> str:
    given = turn.get(key)
    if not isinstance(given, str):
        raise RowError(f"{where}.{key}", f"is {kind(given)}, not text")
    return given
