"""The teacher's side of a batch, as the terms of an objective compare with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distilvlm.losses.sparse import Sparse


@dataclass(frozen=True)
class Targets:
    """Of the rows that were asked for, in their order.

    Exact targets are hidden states and a head. Where a teacher knows only some probabilities of the response rows,
    these are `responses`, and `hidden` is of the visual rows alone; it may then be missing where no term asks for them.
    Relation matrices stand in for visual rows where no other term asks for these: what `hidden` has there, if it is
    given, does not count.
    """

    hidden: Tensor | None  # [rows, d_teacher], final-normed hidden states
    head: Tensor | None  # [vocab_teacher, d_teacher]
    responses: Sparse | None = None  # of the batch's response rows
    relations: tuple[Tensor, ...] | None = None  # [visual, visual] of each sample with pictures, instead of visual rows
    visual: Tensor | None = None  # [pictures, visual rows of one, d_teacher], where its rows are not the batch's
    vocabulary: int | None = None  # ids that both have, where there is no head to tell; None: all of the student's

    @property
    def meets(self) -> frozenset[str]:
        """Of `Objective.needs`, what these can meet."""
        exact = self.hidden is not None and self.head is not None
        found = {"teacher.responses"} if exact or self.responses is not None else set[str]()
        if exact and self.relations is None:
            found.add("teacher.visual")
        if exact or self.relations is not None:
            found.add("teacher.relation")
        return frozenset(found)

    @property
    def ids(self) -> int | None:
        """Length of the teacher's vocabulary; None: at least the student's."""
        return self.vocabulary if self.head is None else self.head.shape[0]
