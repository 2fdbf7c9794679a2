"""Readers: LLaVA's JSON and OpenAI-style messages become records; what can't is named, never dropped in silence."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from distilvlm.data.batch import BadRow, SampleKey
from distilvlm.data.markers import neutralise, place
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.records import PICTURE, Records, Role, Turn
from distilvlm.data.rows import MalformedRow, rows
from distilvlm.recipe.schema import SourceSpec

logger = logging.getLogger(__name__)

LLAVA_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LLAVA_ROLES["system"] = "system"
MESSAGE_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


@dataclass
class Source:
    """A data source that was read: its records, and everything about it that was not as it should be."""

    name: str  # in the recipe's `data`
    spec: SourceSpec
    format: str  # "llava" or "messages": as given, or as found
    records: Records
    bad: list[BadRow] = field(default_factory=list)
    neutralised: int = 0  # typed image tokens (and private-use characters) made harmless
    markers_added: int = 0  # records with a picture whose text had no place for it
    answers_dropped: int = 0  # answers before the first question, left out as LLaVA does


@dataclass
class _Draft:
    images: list[str]
    turns: list[Turn]
    neutralised: int = 0
    marker_added: bool = False
    answers_dropped: int = 0


def read(spec: SourceSpec, name: str) -> Source:
    """Read the data source `name`. Rows that can't be used are in `Source.bad`; see `problems.raise_or_quarantine`.

    Raises:
        DataError: the file can't be read, its format is unknown, or it has another number of rows than the recipe says.
    """
    path = Path(spec.path)
    root = Path(spec.images) if spec.images else path.parent
    source = Source(name, spec, spec.format, Records(name, str(path), root))
    count = 0
    for row, value in enumerate(rows(path)):
        count = row + 1
        if spec.take is not None and row >= spec.take:
            if spec.rows is None:
                break
            continue  # the rest is only counted
        try:
            draft = _draft(value, source, root)
        except RowError as error:
            source.bad.append(BadRow(SampleKey(name, str(path), row), error.field, error.reason))
            continue
        source.records.append(row, _identity(value, row), draft.images, draft.turns)
        source.neutralised += draft.neutralised
        source.markers_added += draft.marker_added
        source.answers_dropped += draft.answers_dropped
    if spec.rows is not None and count != spec.rows:
        raise DataError(f"{path} has {count} rows, but data.{name}.rows says {spec.rows}: is it the right file, whole?")
    logger.info(
        "data '%s': %d records (%s) from %s; %d bad rows, %d typed image tokens neutralised, %d missing markers added, "
        "%d leading answers left out",
        *(name, len(source.records), source.format, path, len(source.bad)),
        *(source.neutralised, source.markers_added, source.answers_dropped),
    )
    return source


def check_llava(value: dict[str, Any], root: Path) -> None:
    """Raise the `RowError` that makes a LLaVA row unusable, if any; `read` takes every other."""
    _check_order(_llava(value, root), "conversations")


def _draft(value: Any, source: Source, root: Path) -> _Draft:
    if isinstance(value, MalformedRow):
        raise RowError("row", value.reason)
    if not isinstance(value, dict):
        raise RowError("row", f"is {_kind(value)}, not an object")
    if source.format == "auto":
        source.format = _detect(value, source)
        logger.info("data '%s': format '%s', told from the first row", source.name, source.format)
    draft = _llava(value, root) if source.format == "llava" else _messages(value, root)
    key = "conversations" if source.format == "llava" else "messages"
    _check_order(draft, key)
    return draft


def _detect(value: dict[str, Any], source: Source) -> str:
    for key, name in (("conversations", "llava"), ("messages", "messages")):
        if key in value:
            return name
    raise DataError(
        f"{source.spec.path}: the first row has neither 'conversations' (LLaVA) nor 'messages' (OpenAI), only "
        f"{sorted(map(str, value))}; set data.{source.name}.format, or convert the file"
    )


def _llava(value: dict[str, Any], root: Path) -> _Draft:
    images = [_picture(given, name, root) for name, given in _pictures_of(value, ("image", "images"))]
    turns: list[Turn] = []
    for position, turn in enumerate(_list(value, "conversations")):
        where = f"conversations[{position}]"
        turns.append(Turn(_role(turn, where, "from", LLAVA_ROLES), _text(turn, where, "value")))
    placed, neutralised, added = place(turns, len(images), "conversations")
    return _Draft(images, placed, neutralised, added)


def _messages(value: dict[str, Any], root: Path) -> _Draft:
    apart = [_picture(given, name, root) for name, given in _pictures_of(value, ("images", "image"))]
    messages = _list(value, "messages")
    if not any(isinstance(message, dict) and _has_pictures(message.get("content")) for message in messages):
        turns = [_message(message, f"messages[{n}]", _no_picture)[0] for n, message in enumerate(messages)]
        placed, neutralised, added = place(turns, len(apart), "messages")
        return _Draft(apart, placed, neutralised, added)

    waiting = iter(apart)
    images: list[str] = []

    def take_picture(part: dict[str, Any], where: str) -> None:
        given = _address(part)
        path = next(waiting, None) if given is None else _picture(given, where, root)
        if path is None:
            raise RowError(where, "names no picture, and 'images' has none left")
        images.append(path)

    draft = _Draft(images, [])
    for position, message in enumerate(messages):
        turn, typed = _message(message, f"messages[{position}]", take_picture, typed_markers=True)
        draft.turns.append(turn)
        draft.neutralised += typed
    left = sum(1 for _ in waiting)
    if left:
        raise RowError("images", f"{left} more than the messages have places for")
    return draft


def _message(
    message: Any, where: str, picture: Callable[[dict[str, Any], str], None], typed_markers: bool = False
) -> tuple[Turn, int]:
    """One message as a turn. An image part becomes PICTURE and a newline; with `typed_markers` any `<image>` in text
    was typed, because the pictures' places are parts."""
    role = _role(message, where, "role", MESSAGE_ROLES)
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RowError(f"{where}.content", f"is {_kind(content)}, not text or a list of parts")
    text, typed = "", 0
    for position, part in enumerate(parts):
        inner = f"{where}.content" if isinstance(content, str) else f"{where}.content[{position}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            piece = _text(part, inner, "text")
            if typed_markers:
                piece, count = neutralise(piece, inner)
                typed += count
            text += piece
        elif kind in ("image", "image_url"):
            if role != "user":
                raise RowError(inner, f"a picture in the turn of the {role}; only the user shows pictures")
            picture(part, inner)
            text += f"{PICTURE}\n"
        else:
            raise RowError(inner, f"is a part of type {kind!r}; known are text, image and image_url")
    return Turn(role, text), typed


def _check_order(draft: _Draft, key: str) -> None:
    turns = draft.turns
    first = 1 if turns and turns[0].role == "system" else 0
    while first < len(turns) and turns[first].role == "assistant":
        del turns[first]
        draft.answers_dropped += 1
    for position, turn in enumerate(turns[first:], start=first):
        expected = "assistant" if (position - first) % 2 else "user"
        if turn.role != expected:
            where = f"{key}[{position + draft.answers_dropped}]"
            raise RowError(where, f"is the {turn.role}'s where the {expected}'s turn is due: roles must alternate")
    if not any(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise RowError(key, "no answer with text in it: nothing to learn")


def _has_pictures(content: Any) -> bool:
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") in ("image", "image_url") for part in content
    )


def _no_picture(part: dict[str, Any], where: str) -> None:
    raise RowError(where, "unexpected picture")


def _address(part: dict[str, Any]) -> Any:
    """What an image part names: OpenAI's `image_url: {url}`, or `image` / `path` / `url` as transformers has them."""
    for key in ("image_url", "image", "path", "url"):
        given = part.get(key)
        if isinstance(given, dict):
            given = given.get("url")
        if given is not None:
            return given
    return None


def _pictures_of(value: dict[str, Any], keys: Sequence[str]) -> list[tuple[str, Any]]:
    for key in keys:
        given = value.get(key)
        if isinstance(given, list):
            return [(f"{key}[{position}]", item) for position, item in enumerate(given)]
        if given is not None:
            return [(key, given)]
    return []


def _picture(given: Any, where: str, root: Path) -> str:
    """The path of a picture that exists, relative to `root` where it was given so."""
    if not isinstance(given, str) or not given:
        raise RowError(where, f"is {_kind(given)}, not the path of a picture")
    scheme = urlsplit(given).scheme if ":" in given[:8] else ""
    if scheme in ("http", "https"):
        raise RowError(where, f"remote pictures are not fetched: download {given} and give its path")
    if scheme == "data":
        raise RowError(where, "pictures inside the data file are not read: write it to a file and give its path")
    path = unquote(urlsplit(given).path) if scheme == "file" else given
    if "\0" in path or not os.path.isfile(root / path):  # noqa: PTH113 (once per row: half of pathlib's time)
        raise RowError(where, f"no file {root / path}")
    return path


def _identity(value: dict[str, Any], row: int) -> str:
    given = value.get("id")
    return str(row) if given is None else str(given)


def _list(value: dict[str, Any], key: str) -> list[Any]:
    given = value.get(key)
    if key not in value:
        raise RowError(key, f"is missing; the row has {sorted(map(str, value))}")
    if not isinstance(given, list) or not given:
        raise RowError(key, f"is {_kind(given)}, not a list of turns")
    return given


def _role(turn: Any, where: str, key: str, roles: dict[str, Role]) -> Role:
    if not isinstance(turn, dict):
        raise RowError(where, f"is {_kind(turn)}, not an object")
    given = turn.get(key)
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        raise RowError(f"{where}.{key}", f"is {given!r}; known roles are {', '.join(roles)}")
    return role


def _text(turn: dict[str, Any], where: str, key: str) -> str:
    given = turn.get(key)
    if not isinstance(given, str):
        raise RowError(f"{where}.{key}", f"is {_kind(given)}, not text")
    return given


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if value in ([], "", {}):
        return "empty"
    return {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}[
        type(value)
    ]
