"""The teacher as an interface: something that gives targets for the rows a stage's loss terms ask for.

A teacher stands outside the wrapped task module: it has no gradient, and no engine shards or synchronises it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distilvlm.data.alignment import TeacherView
from distilvlm.data.batch import Batch
from distilvlm.losses.sparse import Sparse
from distilvlm.models.vlm import VLM


class TeacherError(ValueError):
    """This teacher cannot give what a stage needs; raised before the first step, with the fix."""


@dataclass(frozen=True)
class Targets:
    """The teacher's side of a batch, for the rows that were asked for, in their order.

    Exact targets are hidden states and a head. Where a teacher knows only some probabilities of the response rows,
    these are `responses`, and `hidden` is of the visual rows alone; it may then be missing where no term asks for them.
    """

    hidden: Tensor | None  # [rows, d_teacher], final-normed hidden states
    head: Tensor | None  # [vocab_teacher, d_teacher]
    responses: Sparse | None = None  # of the batch's response rows
    relations: tuple[Tensor, ...] | None = None  # [visual, visual] of each sample with pictures, instead of visual rows
    visual: Tensor | None = None  # [pictures, visual rows of one, d_teacher], where its rows are not the batch's


class Teacher(Protocol):
    """What a stage may rely on."""

    @property
    def provides(self) -> frozenset[str]:
        """Of `Objective.needs`, what this teacher can meet: "teacher.responses", "teacher.visual",
        "teacher.relation"."""
        ...

    @property
    def head(self) -> Tensor | None:
        """The output head, [vocab_teacher, d_teacher]; it never changes. None of a teacher that gives no hidden
        rows."""
        ...

    @property
    def vlm(self) -> VLM | None:
        """The model, as far as it is here: of one that is cached or elsewhere its outline without weights; None where
        not even its files are here."""
        ...

    @property
    def shares_vision(self) -> bool:
        """Whether the student's tower serves both: `targets` then takes its features."""
        ...

    @property
    def view(self) -> TeacherView | None:
        """How it reads a record; None for a teacher that reads the student's rows."""
        ...

    def targets(self, batch: Batch, rows: Tensor, features: Tensor | None) -> Targets:
        """Targets for the flat `rows` of `batch`; `features` are shared vision features, or None to compute its own."""
        ...
