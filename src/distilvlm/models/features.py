"""Vision features of a frozen tower, computed once per picture and kept on disk (kept.py says how)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .alone import Encoder
from .forward import vision_features
from .kept import FeatureError, PictureReader, PictureStore
from .vlm import VLM, VisionLayout

__all__ = ["FeatureError", "FeatureReader", "FeatureStore"]


class FeatureStore(PictureStore):
    """A directory of features made by one tower, at one size and geometry, and refused for any other.

    Args:
        tower: `fingerprint` of the vision tower.
        geometry: how pictures become canvases ('square', 'pad', 'crop').
        dtype: what features are kept in.
        shard: pictures per file, of the shards that this object plans.

    Raises:
        FeatureError: the directory holds features that were made otherwise; says what differs.
    """

    def __init__(
        self,
        directory: str | Path,
        layout: VisionLayout,
        tower: str,
        geometry: str,
        dtype: torch.dtype = torch.float32,
        shard: int = 256,
    ) -> None:
        made_with: dict[str, Any] = {"version": 1, "tower": tower, "geometry": geometry, "dtype": str(dtype)}
        super().__init__(directory, made_with | asdict(layout), shard)
        self._layout = layout
        self._dtype = dtype

    def fill(
        self,
        paths: Iterable[str | Path],
        vlm: VLM | Encoder,
        canvas: Callable[[str], Tensor],
        batch: int = 16,
        rank: int = 0,
        world: int = 1,
        skip_unreadable: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> dict[str, str]:
        """Compute what is missing, on the device where the tower is; arguments, value and errors as `fill_with`."""
        tower: nn.Module = vlm.model.model.vision_tower
        device = next(tower.parameters()).device

        def compute(canvases: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                features = vision_features(vlm.model, vlm.layout, canvases.to(device))  # [P, placeholders, d_vision]
            return {"features": features.to("cpu", self._dtype)}

        return self.fill_with(paths, compute, canvas, self._layout.size, batch, rank, world, skip_unreadable, progress)

    def reader(self) -> FeatureReader:
        """What loader workers call: picture file -> features."""
        return FeatureReader(self.directory)


class FeatureReader(PictureReader):
    """Picture file -> features [placeholders, d_vision] on the CPU, in the dtype they are kept in."""

    def __call__(self, path: str | Path) -> Tensor:
        """Errors as `read`."""
        return self.read(path)["features"]
