"""A teacher that reads rows of its own: it spells with other tokens than the student, or sees a picture as others."""

from __future__ import annotations

from torch import Tensor, nn

from distilvlm.data.alignment import TeacherView
from distilvlm.models.vlm import VLM, VisionLayout
from distilvlm.recipe import TeacherSpec

from .interface import TeacherError


def view(spec: TeacherSpec, teacher: VLM, student: VLM) -> TeacherView | None:
    """How the teacher reads a record; None for one that reads the student's rows, or, in a plan, whose tokenizer is not
    here. Where tokens are the same, it reads them as the student's template writes them."""
    seen = [(vlm.layout.visual, vlm.layout.size) for vlm in (teacher, student)]
    others = spec.visual == "assignment" or (spec.visual == "interpolate" and seen[0] != seen[1])
    tokenizer = teacher.tokenizer if spec.tokens == "aligned" else student.tokenizer
    if tokenizer is None or not (spec.tokens == "aligned" or others):
        return None
    return TeacherView(tokenizer, teacher.layout.placeholders, teacher.layout.visual, teacher.layout.size)


def require_comparable_pictures(spec: TeacherSpec, teacher: VisionLayout, student: VisionLayout) -> None:
    """Raises `TeacherError` where a picture's rows cannot be compared as `spec.visual` says; not for "same"."""
    if spec.visual == "interpolate":
        grid(teacher, "teacher")
        grid(student, "student")
    theirs, ours = sum(teacher.visual), sum(student.visual)
    if spec.visual == "assignment" and theirs < ours:
        raise TeacherError(
            f"teacher.visual: assignment gives each of the student's {ours} visual rows one of the teacher's, which "
            f"has only {theirs}: use visual: interpolate"
        )


def grid(layout: VisionLayout, whose: str) -> tuple[int, int]:
    """Rows and columns of a picture's visual tokens.

    Raises:
        TeacherError: they are not a whole grid.
    """
    side, visual = layout.size // layout.patch, sum(layout.visual)
    if side * side != visual:
        raise TeacherError(
            f"a picture of {side} × {side} patches is {visual} visual tokens to the {whose} "
            f"(select '{layout.select}'), which can't be interpolated: set its vision.select to patches"
        )
    return side, side


def interpolated(rows: Tensor, theirs: tuple[int, int], ours: tuple[int, int]) -> Tensor:
    """Rows over the teacher's grid as means over the areas of the student's: [pictures, visual_teacher, d] to
    [pictures, visual, d].

    A head is linear, so these are the means of its logits, too. Areas are torch's: whole rows of the larger grid, which
    overlap where it is no multiple of the smaller one.
    """
    maps = rows.transpose(1, 2).unflatten(2, theirs)  # [pictures, d, rows, columns]
    return nn.functional.interpolate(maps, ours, mode="area").flatten(2).transpose(1, 2)
