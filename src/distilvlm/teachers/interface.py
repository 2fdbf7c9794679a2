"""The teacher as an interface: something that gives targets for the rows a stage's loss terms ask for.

A teacher stands outside the wrapped task module: it has no gradient, and no engine shards or synchronises it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distilvlm.data.batch import Batch


class TeacherError(ValueError):
    """This teacher cannot give what a stage needs; raised before the first step, with the fix."""


@dataclass(frozen=True)
class Targets:
    """The teacher's side of a batch, for the rows that were asked for, in their order."""

    hidden: Tensor  # [rows, d_teacher], final-normed hidden states
    head: Tensor  # [vocab_teacher, d_teacher]


class Teacher(Protocol):
    """What a stage may rely on."""

    @property
    def provides(self) -> frozenset[str]:
        """Needs that this teacher can meet, e.g. {"teacher.hidden"}."""
        ...

    @property
    def head(self) -> Tensor:
        """The output head, [vocab_teacher, d_teacher]; it never changes."""
        ...

    def targets(self, batch: Batch, rows: Tensor, features: Tensor | None) -> Targets:
        """Targets for the flat `rows` of `batch`; `features` are shared vision features, or None to compute its own."""
        ...
