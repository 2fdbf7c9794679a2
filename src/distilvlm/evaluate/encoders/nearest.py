"""k nearest neighbours: which training pictures look like this one to the encoder, and what are they?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Both as in DINO's evaluation (facebookresearch/dino, eval_knn.py), the usual way to measure an encoder as it is."""


def nearest(
    gallery: Tensor, labels: Tensor, queries: Tensor, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Tensor:
    """The class that the k training pictures of largest cosine vote for, each with weight exp(cosine / temperature).

    Nothing is trained and nothing drawn. Of neighbours equally near the first come first, of classes with equal votes
    the smallest number wins.

    Args:
        gallery: [n, d] vectors of training pictures; `labels` [n] int64, their classes.
        queries: [m, d].
        k: fewer where the gallery is smaller.

    Returns:
        [m] int64.

    Raises:
        ValueError: an empty gallery, or labels of another number.
    """
    if not len(gallery) or len(labels) != len(gallery):
        raise ValueError(f"{len(labels)} labels for {len(gallery)} training pictures; at least one is needed")
    near = nn.functional.normalize(gallery.double(), dim=1)
    cosines = nn.functional.normalize(queries.double(), dim=1) @ near.T  # [m, n]
    values, places = cosines.sort(dim=1, descending=True, stable=True)
    votes = torch.zeros(len(queries), int(labels.max()) + 1, dtype=torch.float64)
    # Weights relative to the nearest one: the same votes, and no overflow at a small temperature.
    weights = ((values[:, :k] - values[:, :1]) / temperature).exp()
    votes.scatter_add_(1, labels[places[:, :k]], weights)
    return votes.argmax(dim=1)
