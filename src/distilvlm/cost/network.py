"""What goes over the network between a run and a teacher elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from distilvlm.models import forward
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec, TeacherSpec
from distilvlm.recipe.teachers import KeepSpec

WORD = 5
"""Bytes of a token in a prompt, as text or as a number in JSON, about."""

KNOWN = 75
"""Bytes of one id and its log-probability in an answer, about: vLLM tells its rank and its text, too."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one update, over all processes."""

    sent: int
    received: int | None  # None where the teacher's width is not known here
    once: int | None  # its head, by each process; None where its size is not known


@dataclass(frozen=True)
class Content:
    """A stage's mean sample."""

    positions: float
    learned: float  # response rows
    pictures: float


def received(spec: TeacherSpec) -> KeepSpec:
    """What the targets of a teacher elsewhere are like as they arrive, in the words of one that is kept on disk."""
    if spec.remote is not None and spec.remote.protocol == "openai":
        return KeepSpec(responses="top_k", top_k=spec.remote.top_k + 1, visual="relation")  # no head comes along
    return KeepSpec()


def traffic(recipe: Recipe, stage: StageSpec, student: VLM, teacher: VLM | None, content: Content) -> Traffic | None:
    """What an update of `stage` asks of a teacher elsewhere; None where there is none, or it is not asked in training.

    Args:
        teacher: without weights is enough; None where its files are not here.
    """
    spec, loss, layout = recipe.teacher, stage.loss, student.layout
    if spec is None or spec.kind != "remote" or spec.remote is None or not loss.compares:
        return None
    batch, pixels = stage.optim.batch, content.pictures * 3 * layout.size**2
    if spec.remote.protocol == "openai":
        sent = content.positions * WORD + pixels * 4 / 3  # base64; PNG makes them smaller, noise does not
        received = content.positions * (spec.remote.top_k + 1) * KNOWN
        return Traffic(round(batch * sent), round(batch * received), 0)
    visual = content.pictures * sum(layout.visual) if loss.visual or loss.relation else 0
    rows = (content.learned if loss.response else 0) + visual
    # Ids and the mask of every position, the places of pictures and the rows that are wanted, and the pictures.
    sent = 8 * (2 * content.positions + content.pictures * layout.placeholders + rows) + pixels
    if teacher is None:
        return Traffic(round(batch * sent), None, None)
    vocabulary, width = forward.head_weight(teacher.model).shape
    held = 2 if spec.held == "bf16" else 4
    return Traffic(round(batch * sent), round(batch * rows * width * held), vocabulary * width * held)
