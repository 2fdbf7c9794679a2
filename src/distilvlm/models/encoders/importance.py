"""Where an encoder looks, as one number per token: CLS attention, and what stands in for it (specification §7.3).

The paper's importance is the attention of CLS to the patches, normalised over these alone in every head, then averaged.
Encoders without CLS have, in order of preference: another encoder's importance (CLIP, DINOv2) brought to their grid
(`regrid`); the learned query of their own pooling head (SigLIP); the attention that a token receives from all others,
clipped, because a few artefact tokens of high norm receive most of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .interface import Seen

PERCENTILE = 0.98
"""Received attention above this quantile of a picture's tokens is cut to it. Ours: the method has no such source."""


def importance_of(attention: Tensor) -> Tensor:
    """One weight per patch, from attention to patches that was normalised over more keys than these (CLS, registers).

    A head's softmax over patches alone is its row divided by its sum. Heads are averaged after that.

    Args:
        attention: [pictures, heads, N], not negative.

    Returns:
        [pictures, N] float32; each row sums to 1.
    """
    rows = attention.float()
    total = rows.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (rows / total).mean(1)


def clipped(importance: Tensor, percentile: float = PERCENTILE) -> Tensor:
    """[pictures, N] with what lies above the picture's own quantile cut to it, summing to 1 again."""
    limit = importance.quantile(percentile, dim=-1, keepdim=True)
    cut = importance.minimum(limit)
    return cut / cut.sum(-1, keepdim=True)


def regrid(importance: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """An importance map on another grid: averaged over areas where that is coarser, else bilinear; sums to 1 again.

    Args:
        importance: [pictures, rows * columns] on `grid`.

    Returns:
        [pictures, rows * columns] on `target`.
    """
    if grid == target:
        return importance
    maps = importance.unflatten(-1, grid).unsqueeze(1)  # [pictures, 1, rows, columns]
    if target[0] <= grid[0] and target[1] <= grid[1]:
        maps = nn.functional.interpolate(maps, target, mode="area")
    else:
        maps = nn.functional.interpolate(maps, target, mode="bilinear", align_corners=False)
    resized = maps.flatten(1)
    return resized / resized.sum(-1, keepdim=True)


def query_of(seen: Seen) -> Tensor:
    """What teachers' tokens are scored against: CLS, else the mean of the tokens, weighted by importance.

    Both lie in the space of the tokens at the layer that is read. [pictures, C].

    Raises:
        ValueError: neither CLS nor importance was asked for.
    """
    if seen.cls is not None:
        return seen.cls
    if seen.importance is None:
        raise ValueError("an encoder without CLS needs importance to give a query: see(pixels, importance=True)")
    return torch.einsum("pn,pnc->pc", seen.importance.to(seen.tokens.dtype), seen.tokens)
