"""How well teachers' features can be read off a student's: a linear map, fitted to training pictures.

Unlike the distance that a run's own adapters leave (error.py), it is of one target for every student, whatever adapters
it was trained with and on which side they stood, and for one that was never trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distilvlm.data.convert.split import drawn
from distilvlm.data.geometry import content
from distilvlm.evaluate.encoders.error import Compared, Pairs
from distilvlm.evaluate.encoders.measured import HELD_OUT

STRENGTHS = tuple(10.0**power for power in range(0, -7, -1))
"""Ridge penalties that are tried, from strong to weak, in units of the mean square of a (centred) channel."""


class Readout:
    """Ridge regression from the student's tokens to each teacher's at the same place: `Compared`, for `feature_errors`.

    The penalty is chosen for each teacher on the part of the training pictures that `HELD_OUT` names (told by content,
    so copies of a picture stay on one side); then all are fitted. Solved in float64: no draw, no learning rate.

    Args:
        tokens: picture files → teacher → the student's tokens on the teacher's grid, and the teacher's,
            [pictures, N, d] and [pictures, N, C].
        training: pictures that the map is fitted to.

    Raises:
        ValueError: no pictures, or too few to hold some out.
    """

    def __init__(self, tokens: Compared, training: Sequence[str]) -> None:
        self._tokens = tokens
        held_out = torch.tensor([drawn(content(path), 0) < HELD_OUT for path in training], dtype=torch.bool)
        if held_out.all() or not held_out.any():
            raise ValueError(
                f"{int(held_out.sum())} of {len(held_out)} training pictures are held out to choose the readout's "
                "penalty: there must be some on both sides; give more pictures"
            )
        sums: dict[str, tuple[_Sums, _Sums]] = {}
        start = 0
        for pairs in tokens(training):
            for name, (student, teacher) in pairs.items():
                chosen = held_out[start : start + len(teacher)].to(teacher.device)
                parts = sums.setdefault(name, (_Sums(student, teacher), _Sums(student, teacher)))
                for part, which in zip(parts, (~chosen, chosen), strict=True):
                    part.add(student[which], teacher[which])
            start += len(next(iter(pairs.values()))[1])
        self._weights = {name: _fitted(*parts) for name, parts in sums.items()}  # [d + 1, C] float64 each

    def __call__(self, paths: Sequence[str]) -> Iterator[Pairs]:
        """What the map reads off the student, and what is right."""
        for pairs in self._tokens(paths):
            yield {name: (_with_one(mine) @ self._weights[name], theirs) for name, (mine, theirs) in pairs.items()}


class _Sums:
    """XᵀX and XᵀY of tokens X, with a column of ones, and YᵀY's trace: all that a fit and its error need."""

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        wide, device = student.shape[-1] + 1, student.device
        self.inputs = torch.zeros(wide, wide, dtype=torch.float64, device=device)
        self.both = torch.zeros(wide, teacher.shape[-1], dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, student: Tensor, teacher: Tensor) -> None:
        inputs, outputs = _with_one(student).flatten(0, 1), teacher.double().flatten(0, 1)
        self.inputs += inputs.T @ inputs
        self.both += inputs.T @ outputs
        self.squares += outputs.square().sum()

    def solved(self, strength: float) -> Tensor:
        """[d + 1, C] of the smallest squared error plus the penalty; the intercept is free."""
        count = self.inputs[-1, -1]
        mean = self.inputs[-1, :-1] / count
        scale = (self.inputs.diagonal()[:-1].mean() / count - mean.square().mean()).clamp_min(1e-12)
        penalty = torch.zeros_like(self.inputs).fill_diagonal_(float(strength * scale * count))
        penalty[-1, -1] = 0
        return torch.linalg.solve(self.inputs + penalty, self.both)

    def error(self, weight: Tensor) -> float:
        """Σ ‖X W − Y‖²."""
        return float((weight * (self.inputs @ weight - 2 * self.both)).sum() + self.squares)


def _fitted(fit: _Sums, held_out: _Sums) -> Tensor:
    errors = [held_out.error(fit.solved(strength)) for strength in STRENGTHS]
    fit.inputs += held_out.inputs
    fit.both += held_out.both
    return fit.solved(STRENGTHS[errors.index(min(errors))])


def _with_one(tokens: Tensor) -> Tensor:
    """[..., d] → [..., d + 1] float64, the last of them 1."""
    return torch.cat([tokens.double(), tokens.new_ones(*tokens.shape[:-1], 1, dtype=torch.float64)], dim=-1)
