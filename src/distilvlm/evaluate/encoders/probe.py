"""A linear probe: what a linear classifier can read off an encoder's vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

STRENGTHS = tuple(10.0**power for power in range(1, -6, -1))
"""Weights of the L2 penalty that are tried, from strong to weak."""

ITERATIONS = 300


@dataclass(frozen=True)
class Probe:
    """A fitted classifier."""

    weight: Tensor  # [classes, d] float64, of standardised vectors
    bias: Tensor  # [classes]
    mean: Tensor  # [d], of the vectors that it was fitted to
    deviation: Tensor  # [d]
    strength: float  # of the penalty

    def logits(self, vectors: Tensor) -> Tensor:
        """[m, classes] float64 of vectors [m, d]."""
        return (vectors.double() - self.mean) / self.deviation @ self.weight.T + self.bias

    def classes(self, vectors: Tensor) -> Tensor:
        """[m] int64; of equal logits the smallest class number."""
        return self.logits(vectors).argmax(dim=1)


def fitted(vectors: Tensor, labels: Tensor, held_out: Tensor) -> Probe:
    """Multinomial logistic regression with an L2 penalty, of which the strength is chosen on part of the training data.

    For every strength the classifier is fitted to what is not held out; the strength with the smallest cross-entropy
    on the rest is kept (of equal ones the strongest), and fitted to all. Vectors are standardised by what is fitted to.
    The problem is convex and solved in float64 by L-BFGS from zeros: no draw, no learning rate.

    Args:
        vectors: [n, d] of training pictures; `labels` [n] int64.
        held_out: [n] bool.

    Raises:
        ValueError: all is held out, or nothing.
    """
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"{int(held_out.sum())} of {len(held_out)} training pictures are held out to choose the penalty's "
            "strength: there must be some on both sides; give more pictures"
        )
    vectors, count = vectors.double(), int(labels.max()) + 1
    losses: list[float] = []
    weight = None
    for strength in STRENGTHS:
        probe = _fit(vectors[~held_out], labels[~held_out], count, strength, weight)
        weight = torch.cat([probe.weight, probe.bias[:, None]], dim=1)  # where the next one starts
        losses.append(float(nn.functional.cross_entropy(probe.logits(vectors[held_out]), labels[held_out])))
    return _fit(vectors, labels, count, STRENGTHS[losses.index(min(losses))], None)


def _fit(vectors: Tensor, labels: Tensor, count: int, strength: float, start: Tensor | None) -> Probe:
    """Minimises mean cross-entropy + strength / 2 · ‖weight‖²; the bias is free."""
    mean = vectors.mean(0)
    deviation = vectors.std(0, unbiased=False)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))  # a dead channel stays at 0
    inputs = torch.cat([(vectors - mean) / deviation, vectors.new_ones(len(vectors), 1)], dim=1)  # [n, d + 1]
    weight = inputs.new_zeros(count, inputs.shape[1]) if start is None else start.clone()
    weight.requires_grad_(True)
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=ITERATIONS,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = nn.functional.cross_entropy(inputs @ weight.T, labels) + strength / 2 * weight[:, :-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[arg-type]
    found = weight.detach()
    return Probe(found[:, :-1], found[:, -1], mean, deviation, strength)
