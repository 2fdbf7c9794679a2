"""Pictures of a table's rows: paths stay as they are, bytes become files named by their content."""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}


@dataclass
class Store:
    """A directory of pictures named by their content, each once. Bytes are written as they came."""

    directory: Path
    _known: dict[str, str] = field(default_factory=dict)

    def keep(self, content: bytes) -> str:
        """Write a picture unless it is there; returns its file name.

        Raises:
            ValueError: the bytes are no picture.
        """
        digest = _digest(content)
        if digest not in self._known:
            path = self.directory / name_of(content)
            if not path.is_file() or path.stat().st_size != len(content):
                _write(path, content)
            self._known[digest] = path.name
        return self._known[digest]

    def keep_as(self, name: str, content: bytes) -> str:
        """Write a picture under a name of its own, with its directories; returns the name.

        It is kept by its content instead where the name leads out of the directory, or belongs to another picture.

        Raises:
            ValueError: the bytes are no picture.
        """
        suffix(content)
        path, digest = self.directory / name, _digest(content)
        if not _leads_inside(name) or self._known.setdefault(name, digest) != digest:
            return self.keep(content)
        if path.is_file() and path.read_bytes() != content:
            return self.keep(content)
        if not path.is_file():
            _write(path, content)
        return name


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{uuid.uuid4().hex[:12]}")
    partial.write_bytes(content)
    partial.replace(path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _leads_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not {"\0", "\\", ":"} & {*name}


def name_of(content: bytes) -> str:
    """The name of a picture that is called by its content. Raises ValueError: the bytes are no picture."""
    return f"{_digest(content)}{suffix(content)}"


def suffix(content: bytes) -> str:
    """What the name of a picture file ends with, by its content. Raises ValueError: it is none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = image.format or ""
    except Exception:  # broken headers surface as anything
        raise ValueError(f"its {len(content)} bytes are no picture: put a picture file's bytes there") from None
    return SUFFIXES.get(kind, f".{kind.lower()}")


def pictures(value: Any, place: str, store: Store | None) -> tuple[str, ...]:
    """Names of a row's pictures, those given as bytes written to `store`. Raises ValueError: (place, what is wrong)."""
    several = value if isinstance(value, list) else [value]
    return tuple(_image(entry, place, store) for entry in several if entry is not None)


def _image(value: Any, place: str, store: Store | None) -> str:
    """The name of a picture given as a path, as bytes or as {"bytes", "path"} (`datasets`' Image)."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, (bytes, bytearray)) or store is None:
        raise ValueError(place, f"is {type(value).__name__}, neither the path nor the bytes of a picture file")
    try:
        return store.keep(bytes(value))
    except ValueError as error:
        raise ValueError(place, str(error)) from None


def shown_pictures(
    images: tuple[str, ...], place: str, shown: Sequence[Any], talk: str, store: Store | None
) -> tuple[str, ...]:
    """The pictures of a row: its own column's, or those that its conversation names itself.

    Args:
        images: of the column `place`.
        shown: for each picture in the conversation `talk` what it names, or None.

    Raises:
        ValueError: (place, what is wrong).
    """
    named = [picture for picture in shown if picture is not None]
    if named and (images or len(named) < len(shown)):
        raise ValueError(talk, f"names {len(named)} pictures itself, but not all: write all of one kind")
    if shown and not named and not images:
        raise ValueError(talk, f"shows {len(shown)} pictures, but '{place}' holds none")
    return images or pictures(named, talk, store)
