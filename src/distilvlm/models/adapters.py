"""What stands between a student's visual tokens and those of the encoders that teach it, while it trains.

An adapter maps tokens of one grid and width to another's. On the teacher's side, as the method has it, it maps the
teacher's tokens into the student's space; the target moves, so student and adapter may meet half-way (specification
§3.5). On the student's side it maps the student's tokens into the teacher's, and the target stays. The anchor is
compared as it is. Nothing of this is part of a finished student.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate

from distilvlm.losses.encoder import Comparing, Pair, teacher_score
from distilvlm.losses.standardisation import Standardisation
from distilvlm.recipe.encoders import ANCHOR

from .encoders.importance import regrid
from .sources import drawn


@dataclass(frozen=True)
class Tokens:
    """Form of an encoder's tokens of one picture."""

    channels: int
    grid: tuple[int, int]  # rows, columns

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]


class TokenMixer(nn.Module):
    """The method's adapter: a linear layer over channels, GELU, a linear layer over tokens; for one grid only."""

    def __init__(self, source: Tokens, target: Tokens) -> None:
        super().__init__()
        self.channels = nn.Linear(source.channels, target.channels)
        self.tokens = nn.Linear(source.count, target.count)

    def forward(self, tokens: Tensor) -> Tensor:
        """[pictures, N, C] of the source → of the target."""
        return self.tokens(gelu(self.channels(tokens).transpose(1, 2))).transpose(1, 2)


class Interpolation(nn.Module):
    """Tokens brought to the other grid (averaged over areas where that is coarser, else bilinear), then LayerNorm and
    two linear layers over channels. Its weights know of no grid."""

    def __init__(self, source: Tokens, target: Tokens) -> None:
        super().__init__()
        self.grids = source.grid, target.grid
        self.norm = nn.LayerNorm(source.channels)
        self.first = nn.Linear(source.channels, target.channels)
        self.second = nn.Linear(target.channels, target.channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """[pictures, N, C] of the source → of the target."""
        return self.second(gelu(self.first(self.norm(regridded(tokens, *self.grids)))))


def regridded(tokens: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """[pictures, N, C] of one grid → of another: averaged over areas where that is coarser, else bilinear."""
    if source == target:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(-1, source)  # [pictures, C, rows, columns]
    if target[0] <= source[0] and target[1] <= source[1]:
        maps = interpolate(maps, target, mode="area")
    else:
        maps = interpolate(maps, target, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


KINDS = {"token_mixer": TokenMixer, "interpolate": Interpolation}


class Adapters(nn.Module):
    """One adapter per teacher but the anchor, and what standardises targets.

    Args:
        student: form of the visual tokens that are compared, without CLS and registers.
        teachers: name → form of its tokens, the anchor first.
        rules: a stage's.
        seed: of the adapters; each is drawn on its own.

    Raises:
        ValueError: an unknown kind or side, or an anchor whose tokens are not of the student's form.
    """

    def __init__(self, student: Tokens, teachers: Mapping[str, Tokens], rules: Comparing, seed: int = 0) -> None:
        super().__init__()
        if rules.adapter not in KINDS:
            raise ValueError(f"unknown adapter '{rules.adapter}': {', '.join(KINDS)}")
        if rules.side not in ("teacher", "student"):
            raise ValueError(f"adapters stand on the side of the teacher or the student, not '{rules.side}'")
        if (anchor := teachers.get(ANCHOR)) is not None and anchor != student:
            raise ValueError(
                f"the anchor has {anchor.count} tokens of {anchor.channels} channels, the student {student.count} of "
                f"{student.channels}: the anchor is compared token by token, so it must be an encoder like the student"
            )
        self.student, self.teachers, self.rules = student, dict(teachers), rules
        self.of = nn.ModuleDict()
        self.standards = nn.ModuleDict()
        for name, form in teachers.items():
            if rules.standardise:
                self.standards[name] = _Standard(form.channels)
            if name != ANCHOR:
                ends = (form, student) if rules.side == "teacher" else (student, form)
                with drawn(seed, f"adapter {name}"):
                    self.of[name] = KINDS[rules.adapter](*ends)

    def standardise(self, teacher: str, by: Standardisation) -> None:
        """State how a teacher's features are standardised; before the first forward, where rules.standardise."""
        self.standards[teacher].hold(by)  # pyright: ignore

    def forward(
        self,
        student: Tensor,
        targets: Mapping[str, Tensor],
        weights: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        query: Tensor | None = None,
    ) -> list[Pair]:
        """Student and teachers where they are compared, the anchor first.

        Args:
            student: [pictures, n, d]. targets: teacher → [pictures, N, C], as the encoder gives them.
            weights: [pictures, tokens] of `losses.encoder.token_weights`, on `grid` (default: the student's).
            query: [pictures, d] of the anchor, or of another encoder as wide: what teachers are scored against.

        Raises:
            ValueError: a teacher without target, or weighing by scores without a query of the student's width.
        """
        if missing := [name for name in self.teachers if name not in targets]:
            raise ValueError(f"no features of {', '.join(missing)} are given")
        if self.rules.teacher_weights != "none" and self.of:
            if query is None:
                raise ValueError("teachers are weighed by scores, which need a query: the anchor's CLS token")
            if query.shape[-1] != self.student.channels:
                raise ValueError(
                    f"the query that teachers are scored against is {query.shape[-1]} wide, the student's tokens are "
                    f"{self.student.channels}: take it from the anchor, or set encoder.teacher_weights: none"
                )
        return [self._pair(name, student, targets[name], weights, grid, query) for name in self.teachers]

    def _pair(
        self,
        name: str,
        student: Tensor,
        target: Tensor,
        weights: Tensor | None,
        grid: tuple[int, int] | None,
        query: Tensor | None,
    ) -> Pair:
        anchor, where = name == ANCHOR, self.student.grid
        standard = self.standards[name] if name in self.standards else nn.Identity()
        target = standard(target.float())  # kept features are bf16
        score = None
        if anchor:
            student = standard(student)  # both, or the student would have to become what the anchor never was
        else:
            adapter, weighed = self.of[name], self.rules.teacher_weights != "none"
            if self.rules.side == "teacher":
                target = adapter(target)
            else:
                student, where = adapter(student), self.teachers[name].grid
            if weighed and query is not None:
                with torch.no_grad() if self.rules.detach else nullcontext():
                    asked = query.float()
                    if self.rules.side == "student":  # it goes the way of the student's tokens, as if all were it
                        asked = adapter(asked.unsqueeze(1).expand(-1, self.student.count, -1))
                    score = teacher_score(asked, target, scaled=self.rules.teacher_weights == "paper")
        if weights is not None:
            weights = regrid(weights, self.student.grid if grid is None else grid, where)
        return Pair(name, student, target, weights, score, anchor)


class _Standard(nn.Module):
    """A `Standardisation` that is saved with the adapters. NaN until it is stated: forgetting it ends a run."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("rotation", torch.eye(channels))
        self.register_buffer("deviation", torch.tensor(float("nan")))

    def hold(self, by: Standardisation) -> None:
        for name, value in vars(by).items():
            getattr(self, name).copy_(value)

    def forward(self, features: Tensor) -> Tensor:
        by = Standardisation(self.mean, self.rotation, self.deviation)  # pyright: ignore
        with torch.autocast(features.device.type, enabled=False):
            return by(features.float())
