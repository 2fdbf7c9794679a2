"""WebDataset shards: tar files in which the members of a sample follow one another and share the key of their names.
`data.streams.tar` reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

from distilvlm.data.convert.embedded import name_of, suffix
from distilvlm.data.convert.forms import named, renamed
from distilvlm.data.problems import RowError
from distilvlm.storage import opened

NAMES = "picture_names"
"""Field of what pictures are called outside of the shard: inside they are members of their sample."""


def add(tar: tarfile.TarFile, number: int, row: Mapping[str, Any], pictures: Sequence[bytes]) -> None:
    """Append row `number` in LLaVA's form: KEY.json, in which `image` names the members KEY.jpg (several: KEY.0.jpg).

    Raises:
        RowError: a picture is none.
    """
    key, names = f"{number:09d}", named(row)
    if NAMES in row:
        raise RowError(NAMES, "is what shards keep pictures' own names in: call the field otherwise")
    members: list[str] = []
    for place, content in enumerate(pictures):
        try:
            members.append(f"{key}{f'.{place}' if len(pictures) > 1 else ''}{suffix(content)}")
        except ValueError as error:
            raise RowError("image", f"{names[place]}: {error}") from None
    told = {**renamed(row, members), **({NAMES: names} if names else {})}
    _append(tar, f"{key}.json", json.dumps(told, ensure_ascii=False).encode())
    for member, content in zip(members, pictures, strict=True):
        _append(tar, member, content)


def _append(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no owner and no time: the same rows are the same bytes
    member.size = len(content)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(content))


def restored(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes | None]]:
    """A row of shards as `open_rows` gives it, with its pictures' own names (else called by content), and its pictures.

    Raises:
        RowError: a picture can't be read, or has no name where others have one.
    """
    told = dict(row)
    names = told.pop(NAMES, None)
    try:
        held = [_content(address) for address in named(told)]
        names = [name_of(content) for content in held] if names is None else names
    except (OSError, ValueError) as error:
        raise RowError("image", str(error)) from None
    if not isinstance(names, list) or len(names) != len(held):
        raise RowError(NAMES, f"is no list of the names of {len(held)} pictures")
    return renamed(told, names), list(held)


def _content(address: str) -> bytes:
    with opened(address) as stream:
        return stream.read()
