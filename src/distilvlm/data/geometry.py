"""From a picture file to the one canvas that every tower sees.

Resizing is Pillow's bicubic with the rounding of transformers' image processors, so that a stock processor makes the
same pixels of the same picture.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageOps
from torch import Tensor

from distilvlm import storage
from distilvlm.recipe.schema import Augmentation

Geometry = Literal["square", "pad", "crop"]

MAX_PIXELS = 89_478_485
"""Pillow's own limit for decompression bombs (a quarter GiB as RGB); more is refused before it is decoded."""

GREY = (127, 127, 127)
"""LLaVA pads with the tower's mean, `int(mean * 255)`; this is the one of mean 0.5 (SigLIP)."""


class PictureError(ValueError):
    """A picture that can't be read, or is too large to be a picture."""


def header(path: str) -> tuple[int, int]:
    """Width and height from the file's header; nothing is decoded.

    Raises:
        PictureError: no such file, no picture, or too many pixels.
    """
    with _readable(path), _opened(path) as image:
        return _sized(image, MAX_PIXELS)


def upright_size(path: str) -> tuple[int, int]:
    """Width and height of the picture as `decode` gives it (EXIF orientation applied), from the file's header.

    Raises:
        PictureError: as `header`.
    """
    with _readable(path), _opened(path) as image:
        width, height = _sized(image, MAX_PIXELS)
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def problem(path: str, decoded: bool = False) -> str | None:
    """Why the picture can't be read, or None. `decoded`: not only its header but all of it."""
    try:
        decode(path) if decoded else header(path)
    except PictureError as error:
        return str(error)
    return None


def problem_of(stream: BinaryIO) -> str | None:
    """Why a stream's header is no picture's, or None."""
    try:
        with _readable("it"), _image(stream) as image:
            _sized(image, MAX_PIXELS)
    except PictureError as error:
        return str(error)
    return None


def content(path: str) -> str:
    """SHA-256 of the file, hexadecimal: what a picture is, whatever it is called.

    Raises:
        PictureError: it can't be read.
    """
    with _readable(path):
        return storage.digest(path)


def decode(path: str) -> Image.Image:
    """The picture, upright (EXIF), as RGB; transparency over white, 16 bits scaled to 8.

    Raises:
        PictureError: as `header`, or the pixels can't be decoded.
    """
    with _readable(path), _opened(path) as image:
        _sized(image, MAX_PIXELS)
        return _upright(image)


def decode_bytes(data: bytes, formats: tuple[str, ...], pixels: int) -> Image.Image:
    """As `decode`, of a file that somebody else sent.

    Args:
        formats: Pillow's names of those that are read; no decoder of another one sees the bytes.
        pixels: at most.

    Raises:
        PictureError: it is none of these, has more pixels, or can't be decoded.
    """
    with _readable("the picture"):
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except Image.UnidentifiedImageError:
            raise PictureError(f"it is none of {', '.join(formats)}") from None
        with image:
            _sized(image, pixels)
            return _upright(image)


def canvas(
    image: Image.Image, geometry: Geometry, size: int, background: tuple[int, int, int] = GREY
) -> Tensor:  # uint8 [3, size, size]
    """`image` (RGB, as `decode` gives it) on a square canvas, bicubic.

    square: both sides resized (LLaVA-KD); pad: centred on a square of `background` first (LLaVA-1.5); crop: the
    shorter side resized, the centre kept (CLIP).
    """
    if image.mode != "RGB":
        image = _rgb(image)
    width, height = image.size
    if geometry == "pad" and width != height:
        side, left, top = padding(width, height)
        if side * side > MAX_PIXELS:
            raise PictureError(f"{width} x {height} padded to a square has more than {MAX_PIXELS} pixels")
        padded = Image.new("RGB", (side, side), background)
        padded.paste(image, (left, top))
        image = padded
    if geometry == "crop":
        image = _cropped(image, size)
    elif image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def padding(width: int, height: int) -> tuple[int, int, int]:
    """The padded square's side, and how many pixels of it lie left of the picture and above it."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def augment(image: Image.Image, spec: Augmentation, rng: np.random.Generator) -> Image.Image:
    """Random crop, flip and brightness. Five numbers are drawn whatever `spec` asks for, so that changing one of its
    fields leaves the other choices of a sample as they were."""
    share, across, down, flip, bright = rng.random(5)
    if spec.crop < 1:
        scale = math.sqrt(spec.crop + (1 - spec.crop) * share)
        width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        left, top = round((image.width - width) * across), round((image.height - height) * down)
        image = image.crop((left, top, left + width, top + height))
    if flip < spec.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if spec.brightness:
        image = ImageEnhance.Brightness(image).enhance(1 + spec.brightness * (2 * bright - 1))
    return image


def augmentation_rng(seed: int, showing: int, index: int) -> np.random.Generator:
    """The generator of one showing of a sample (its pass, see `sampler`): a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, showing, index])))


def _cropped(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))  # transformers rounds down
    if longer * size > MAX_PIXELS:
        raise PictureError(f"{width} x {height} is too thin to be cropped to its centre")
    target = (size, longer) if width <= height else (longer, size)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return image.crop((left, top, left + size, top + size))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return _rgb(ImageOps.exif_transpose(image))


def _sized(image: Image.Image, pixels: int) -> tuple[int, int]:
    width, height = image.size
    if width * height > pixels:
        raise PictureError(f"{width} x {height} pixels are more than {pixels}: scale it down")
    if not width or not height:
        raise PictureError(f"{width} x {height} pixels: nothing to see")
    return width, height


@functools.cache
def _formats() -> tuple[str, ...]:
    """All that Pillow reads but EPS, a program, for which it would start Ghostscript."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    if not storage.is_inside(path):
        with Image.open(path, formats=_formats()) as image:
            yield image
        return
    with storage.opened(path) as stream, _image(stream) as image:
        yield image


def _image(stream: BinaryIO) -> Image.Image:
    try:
        return Image.open(stream, formats=_formats())
    except Image.UnidentifiedImageError:  # which would name an object's place in memory
        raise PictureError("cannot identify image file") from None


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # broken files surface as OSError, SyntaxError, struct.error, zlib.error, ...
        raise PictureError(f"{path} can't be read as a picture: {error}") from error
