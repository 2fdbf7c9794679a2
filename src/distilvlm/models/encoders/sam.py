"""SAM's image encoder: what its neck gives, one token per place of the 64×64 grid (at its 1,024 px)."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..towers import side_of
from .interface import EncoderTeacher, Seen, View, flattened


class SamEncoder(EncoderTeacher):
    """The neck's output as tokens.

    Args:
        layout: "true", or "reference" for the method's scrambled one (`reference_layout`).

    Raises:
        ValueError: another size than its own: its position embeddings fit that one only.
    """

    def __init__(self, name: str, model: PreTrainedModel, view: View, layout: str) -> None:
        config: Any = model.config
        own, patch = side_of(config, "image_size"), side_of(config, "patch_size")
        assert own is not None and patch is not None
        if view.size != own:
            raise ValueError(
                f"encoder '{name}' (SAM) sees pictures of {own} px only, not {view.size}: leave out 'size'"
            )
        self._layout = layout
        super().__init__(name, model, view, config.output_channels, (own // patch, own // patch), {"layout": layout})

    def _look(self, pixels: Tensor, importance: bool) -> Seen:
        maps: Tensor = self.model(pixels).last_hidden_state  # [pictures, C, rows, columns]
        tokens, grid = flattened(reference_layout(maps) if self._layout == "reference" else maps)
        return Seen(tokens, grid)


def reference_layout(maps: Tensor) -> Tensor:
    """The neck's output as MoVE-KD's code hands it on: for parity with its v1.1, not for use.

    The code reads the channels-first map as if it were channels-last, flattens "places" (in truth channels × rows) to a
    square and unshuffles that by 2. The shape stays, but channel c, row h, column w ends at channel
    4w + 2((c // 2) mod 2) + h mod 2, row c // 4, column (c mod 2) · rows / 2 + h // 2 (specification §6, T3).

    Args:
        maps: [pictures, C, rows, columns] with C · rows a square of an even number and C = 4 · columns.

    Raises:
        ValueError: sizes that the code would fail on, or give another shape for.
    """
    pictures, channels, rows, columns = maps.shape
    side = isqrt(channels * rows)
    if side * side != channels * rows or side % 2 or (4 * columns, side // 2) != (channels, rows):
        raise ValueError(
            f"the reference's layout is defined where channels are 4 times the columns and the grid is square, as "
            f"SAM's 256 × 64 × 64, not for {channels} × {rows} × {columns}: use layout 'true'"
        )
    square = maps.flatten(1, 2).transpose(1, 2).reshape(pictures, columns, side, side)
    unshuffled = square.unflatten(3, (side // 2, 2)).unflatten(2, (side // 2, 2))  # [p, w, r, r2, c, c2]
    return unshuffled.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
