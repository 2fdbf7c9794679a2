"""Pictures inside the page: scaled down, as data URIs, each file once, within a budget."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from distilvlm.data.geometry import PictureError, decode

SIDE = 256
"""Longest side in pixels; a picture is shown at about half of that, which is sharp on a phone's screen."""
SMALL_SIDE = 128
"""Longest side once half of the budget is spent."""
TINY = 96
"""Up to this side a picture is kept as it is and drawn with square pixels: smoothing would hide what the model saw."""


@dataclass(frozen=True)
class Picture:
    """One picture of the page; `uri` is empty where it can't be shown, and `problem` says why."""

    name: str
    uri: str = ""
    width: int = 0
    height: int = 0
    tiny: bool = False
    problem: str = ""


@dataclass
class Album:
    """The pictures of one page.

    Args:
        budget: bytes of data URIs, all together.
    """

    budget: int = 1_700_000
    used: int = 0
    left_out: int = 0
    _made: dict[str, Picture] = field(default_factory=dict)

    def picture(self, path: str) -> Picture:
        """The picture in `path`; one that is missing or beyond the budget says so."""
        if path not in self._made:
            self._made[path] = self._make(path)
        return self._made[path]

    def drawn(self, key: str, name: str, image: Image.Image) -> Picture:
        """A picture that this page draws itself, under a key of its own; one that is beyond the budget says so."""
        if key not in self._made:
            self._made[key] = self._kept(name, image, image.size, tiny=False)
        return self._made[key]

    @property
    def shown(self) -> int:
        return sum(bool(picture.uri) for picture in self._made.values())

    def _make(self, path: str) -> Picture:
        name = Path(path).name
        try:
            image = decode(path)
        except PictureError as error:
            return Picture(name, problem=f"not shown: {_without_folders(str(error), path)}")
        size = image.size
        tiny = max(size) <= TINY
        if not tiny:
            side = SIDE if self.used < self.budget // 2 else SMALL_SIDE
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return self._kept(name, image, size, tiny)

    def _kept(self, name: str, image: Image.Image, size: tuple[int, int], tiny: bool) -> Picture:
        uri = _uri(image, lossless=tiny)
        if self.used + len(uri) > self.budget:
            self.left_out += 1
            return Picture(name, problem="not shown: the pictures above fill the page's budget")
        self.used += len(uri)
        return Picture(name, uri, *size, tiny)


def _uri(image: Image.Image, lossless: bool) -> str:
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=82, optimize=True)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _without_folders(text: str, path: str) -> str:
    return text.replace(path, Path(path).name)
