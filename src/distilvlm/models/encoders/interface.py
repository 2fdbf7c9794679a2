"""What an encoder teacher gives: tokens in their places, and where the encoder itself looked.

All encoders of a stage see ONE canvas per picture, which each brings to its own size and normalisation on its device
(specification §7.1). They are frozen: no gradient, evaluation mode, and outside of autocast, so that features that
were kept on disk are those that would be computed now.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..fingerprint import fingerprint
from ..forward import normalised


@dataclass(frozen=True)
class Seen:
    """What an encoder saw in each of some pictures."""

    tokens: Tensor  # [pictures, N, C] in the encoder's dtype, row by row from the top left
    grid: tuple[int, int]  # rows and columns: N = rows * columns
    cls: Tensor | None = None  # [pictures, C], the CLS token at the same layer
    attention: Tensor | None = None  # [pictures, heads, N] float32, of CLS to patches: softmax was over ALL keys
    importance: Tensor | None = None  # [pictures, N] float32, sums to 1: see importance.importance_of


@dataclass(frozen=True)
class View:
    """How an encoder takes pictures."""

    size: int  # side in pixels
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]


class EncoderTeacher(ABC):
    """A frozen vision encoder.

    Args:
        name: as the recipe calls it.
        model: owned by the teacher from here on.
        channels: C of its tokens.
        grid: rows and columns of its tokens.
        reads: what else its features depend on (layer, layout), for `identity`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        view: View,
        channels: int,
        grid: tuple[int, int],
        reads: dict[str, Any],
    ) -> None:
        self.name = name
        self.model = model.requires_grad_(False).eval()
        self.view = view
        self.channels = channels
        self.grid = grid
        self._reads = reads

    @property
    def size(self) -> int:
        """Side of its pictures in pixels."""
        return self.view.size

    @property
    def tokens(self) -> int:
        """Tokens per picture."""
        return self.grid[0] * self.grid[1]

    @property
    def gives_importance(self) -> bool:
        """Whether `see(..., importance=True)` can be asked for."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """All that its features depend on, beside the canvas: weights (a hash, so revision and dtype too), class,
        preprocessing, layer.

        Raises ValueError for an encoder without weights (meta device).
        """
        return {
            "weights": fingerprint(self.model),
            "class": type(self.model).__name__,
            "view": {
                key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.view).items()
            },
            **self._reads,
        }

    @cached_property
    def identity(self) -> str:
        """SHA-256, hexadecimal, of `made_with`: two encoders with the same one give the same features."""
        return hashlib.sha256(json.dumps(self.made_with, sort_keys=True).encode()).hexdigest()

    def to(self, device: torch.device | str) -> EncoderTeacher:
        """Move it to a device; returns self."""
        nn.Module.to(self.model, device)
        return self

    def pixels(self, canvases: Tensor) -> Tensor:
        """Canvases at this encoder's size, normalised as its weights expect.

        Args:
            canvases: uint8 [pictures, 3, side, side], no smaller than `size`.

        Returns:
            float32 [pictures, 3, size, size]. A canvas of that very size gives the pixels of a stock processor, a
            larger one is resized first: bicubic with antialiasing, the same bits at every call.

        Raises:
            ValueError: canvases of another form, or smaller than `size`.
        """
        side = canvases.shape[-1]
        if canvases.dtype != torch.uint8 or tuple(canvases.shape[1:]) != (3, side, side):
            raise ValueError(
                f"canvases are {list(canvases.shape)} {canvases.dtype}, not uint8 [pictures, 3, side, side]"
            )
        if side < self.size:
            raise ValueError(
                f"encoder '{self.name}' sees pictures of {self.size} px, the canvas has only {side}: build the canvas "
                "at the largest size of a stage's encoders, or give this one a smaller 'size'"
            )
        values = canvases.to(self.device, torch.float32)
        if side != self.size:
            values = nn.functional.interpolate(values, (self.size, self.size), mode="bicubic", antialias=True)
            values = values.clamp(0, 255)  # bicubic overshoots at edges
        return normalised(values, self.view.mean, self.view.std)

    @torch.no_grad()
    def see(self, pixels: Tensor, importance: bool = False) -> Seen:
        """What it sees, on its own device.

        Args:
            pixels: [pictures, 3, size, size] as `pixels` gives them.
            importance: also where it looks, at the cost of one row of one layer's attention.

        Raises:
            ValueError: it was asked for importance and has none (`gives_importance`).
        """
        if importance and not self.gives_importance:
            raise ValueError(
                f"encoder '{self.name}' ({type(self.model).__name__}) has no attention that could weigh tokens: name "
                "one with it as the stage's importance source, e.g. a CLIP or DINOv2"
            )
        device = self.device.type
        autocast = torch.autocast(device, enabled=False) if device != "meta" else nullcontext()
        with autocast:
            return self._look(pixels.to(self.device, self.dtype), importance)

    @abstractmethod
    def _look(self, pixels: Tensor, importance: bool) -> Seen: ...


def flattened(maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Channels-first maps [pictures, C, rows, columns] as tokens [pictures, rows * columns, C], and the grid."""
    _, _, rows, columns = maps.shape
    return maps.flatten(2).transpose(1, 2).contiguous(), (rows, columns)
