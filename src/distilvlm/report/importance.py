"""Where the encoder looks that weighs tokens: a heat map over each example picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from distilvlm.data.geometry import GREY, PictureError, canvas, decode

from .formats import ImportanceFile, ImportanceMap, LookedAt
from .pictures import Album, Picture

SIDE = 224
"""Of a map in pixels."""

COOL_TO_HOT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Stops of matplotlib's inferno: its lightness only rises, so the map reads in grey and to the colour-blind, too."""

FULL = 4
"""Even shares that full heat stands for: one scale for all, or an even map would look as decided as a pointed one."""

HEAT = 0.6
"""Share of the heat in a pixel; the rest is the picture in grey."""

TENTH = 10


@dataclass(frozen=True)
class Looked:
    """One picture and where the encoder looks in it."""

    picture: Picture  # as the encoder sees it
    heat: Picture
    concentrated: float  # share of all weight on the heaviest tenth of the patches


@dataclass(frozen=True)
class Importance:
    """The example pictures of one encoder."""

    encoder: str
    grid: tuple[int, int]
    used_by: list[str]  # how each stage weighs tokens by it
    pictures: list[Looked]

    @property
    def few(self) -> int:
        """Patches of the heaviest tenth."""
        return heaviest(self.grid[0] * self.grid[1])


def importance(file: ImportanceFile | None, album: Album) -> list[Importance]:
    """The maps that a run kept; none where its recipe weighs no tokens."""
    return [_maps(one, album) for one in (file.maps if file is not None else [])]


def heaviest(patches: int) -> int:
    """A tenth of the patches, at least one."""
    return max(1, patches // TENTH)


def _maps(map: ImportanceMap, album: Album) -> Importance:
    return Importance(map.encoder, map.grid, map.used_by, [_looked(one, map, album) for one in map.pictures])


def _looked(looked: LookedAt, map: ImportanceMap, album: Album) -> Looked:
    weights = looked.weights
    concentrated = math.fsum(sorted(weights, reverse=True)[: heaviest(len(weights))])
    try:
        square = canvas(decode(looked.picture), map.geometry, SIDE, GREY).permute(1, 2, 0).numpy()
    except PictureError:
        missing = album.picture(looked.picture)  # says why it can't be shown
        return Looked(missing, missing, concentrated)
    shares = np.array(weights, dtype=np.float32).reshape(map.grid) * len(weights)
    seen = album.drawn(f"{looked.picture} {map.geometry}", Path(looked.picture).name, Image.fromarray(square))
    heat = album.drawn(f"{looked.picture} {map.encoder}", Path(looked.picture).name, heat_over(square, shares / FULL))
    return Looked(seen, heat, concentrated)


def heat_over(picture: np.ndarray, shares: np.ndarray) -> Image.Image:
    """A picture in grey under a heat map.

    Args:
        picture: uint8 [side, side, 3].
        shares: float32 [rows, columns], 0 to 1: a patch each.
    """
    side = picture.shape[0]
    smooth = Image.fromarray(shares).resize((side, side), Image.Resampling.BILINEAR)
    places = np.clip(np.asarray(smooth), 0, 1) * (len(COOL_TO_HOT) - 1)
    stops = np.array(COOL_TO_HOT, dtype=np.float32)
    low = np.minimum(places.astype(int), len(stops) - 2)
    part = (places - low)[..., None]
    heat = stops[low] * (1 - part) + stops[low + 1] * part  # [side, side, 3]
    grey = np.asarray(Image.fromarray(picture).convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((HEAT * heat + (1 - HEAT) * grey).round().astype(np.uint8))
