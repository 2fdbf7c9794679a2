"""The teacher as an interface: something that gives targets for the rows a stage's loss terms ask for.

A teacher stands outside the wrapped task module: it has no gradient, and no engine shards or synchronises it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from torch import Tensor

from distilvlm.data.alignment import TeacherView
from distilvlm.data.batch import Batch
from distilvlm.losses.targets import Targets
from distilvlm.models.vlm import VLM


class TeacherError(ValueError):
    """This teacher cannot give what a stage needs; raised before the first step, with the fix."""


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
        """Targets for the flat `rows` of `batch`, which may be packed (`Batch.unpacked` for a teacher that looks at
        single samples); `features` are shared vision features, or None to compute its own."""
        ...


TERMS = {"teacher.responses": "response", "teacher.visual": "visual", "teacher.relation": "relation"}
"""What a stage may need of a teacher -> the loss term that needs it."""


def require(teacher: Teacher, needs: Collection[str], stage: str) -> None:
    """Refuse a teacher that cannot give what a stage needs.

    Args:
        needs: `Objective.needs` of the stage.
        stage: its name.

    Raises:
        TeacherError: names the terms, and what can be done instead.
    """
    lacking = [term for need, term in TERMS.items() if need in needs and need not in teacher.provides]
    if not lacking:
        return
    given = " and ".join(term for need, term in TERMS.items() if need in teacher.provides) or "no"
    zeros = ", ".join(f"{term}: 0" for term in lacking)
    raise TeacherError(
        f"stage '{stage}' has loss.{' and loss.'.join(lacking)}, and its teacher gives targets of {given} terms only. "
        f"Set {zeros} in stages.{stage}.loss, or let the teacher give hidden rows: in this process (teacher.kind: "
        "local), from disk (kind: cached with keep: {responses: hidden, visual: hidden}), or from a server of "
        "`distilvlm teach` (kind: remote, remote.protocol: distilvlm)"
    )
