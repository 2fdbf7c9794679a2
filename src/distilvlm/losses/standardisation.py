"""Targets of several teachers on one scale, without bending their geometry: PHI-S (PCA, Hadamard, isotropic).

Features are centred, rotated so that all channels have the same variance, and divided by ONE number, their standard
deviation: z = R (t − μ) / σ. Any rotation to equal variances serves; PHI-S takes principal components and a Hadamard
matrix, which does not exist for every width. Ours goes from the principal components on by plane rotations, each of
which brings one channel to the mean variance; a mean over channels of squares is the same for all of them.
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Standardisation:
    """z = R (t − μ) / σ and back."""

    mean: Tensor  # [C]
    rotation: Tensor  # [C, C] orthogonal
    deviation: Tensor  # scalar

    def __call__(self, features: Tensor) -> Tensor:
        """[..., C] → [..., C]"""
        return (features - self.mean) @ self.rotation.T / self.deviation

    def inverse(self, standardised: Tensor) -> Tensor:
        """[..., C] → [..., C]"""
        return standardised * self.deviation @ self.rotation + self.mean


class Moments:
    """Mean and covariance of features that come in pieces, in float64 on their device."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Some more, [..., C]."""
        rows = features.reshape(-1, features.shape[-1]).double()
        total, products = rows.sum(0), rows.T @ rows
        self._sum = total if self._sum is None else self._sum + total
        self._products = products if self._products is None else self._products + products
        self._count += len(rows)

    def standardisation(self) -> Standardisation:
        """Raises ValueError for no features, or features that never change."""
        if self._sum is None or self._products is None:
            raise ValueError("there are no features to standardise by")
        mean = self._sum / self._count
        covariance = self._products / self._count - torch.outer(mean, mean)
        variances, directions = torch.linalg.eigh(covariance)  # columns are directions, variances rise
        variances = variances.clamp_min(0)
        deviation = variances.mean().sqrt()
        if not deviation > 0:
            raise ValueError("features that never change cannot be standardised")
        rotation = equalising(variances) @ directions.T
        return Standardisation(mean.float(), rotation.float(), deviation.float())


def equalising(variances: Tensor) -> Tensor:
    """A rotation of uncorrelated channels after which all have the same variance, [C, C] in float64.

    One channel goes through all others: with one on the other side of the mean there is a plane rotation that gives
    exactly the mean to one of the two, and what it leaves is again uncorrelated with all that are still to come.
    """
    mean = float(variances.mean())
    rising = sorted(range(len(variances)), key=lambda channel: float(variances[channel]))
    rotation = torch.eye(len(variances), dtype=torch.float64, device=variances.device)
    low, high = 0, len(rising) - 1
    carried, value = rising[low], float(variances[rising[low]])
    low += 1
    while low <= high:
        if value < mean:
            other, high = rising[high], high - 1
        else:
            other, low = rising[low], low + 1
        theirs = float(variances[other])
        if value == theirs:
            continue  # both are the mean, up to rounding
        # cos² value + sin² theirs = mean
        part = min(1.0, max(0.0, (mean - value) / (theirs - value)))
        cosine, sine = math.sqrt(1 - part), math.sqrt(part)
        mine, its = rotation[carried].clone(), rotation[other].clone()
        rotation[carried] = cosine * mine + sine * its  # has the mean now
        rotation[other] = cosine * its - sine * mine
        carried, value = other, value + theirs - mean
    return rotation
