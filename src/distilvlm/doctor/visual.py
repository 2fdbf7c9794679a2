"""What a picture is to teacher and student: rows can only be paired if both see it as the same tokens."""

from __future__ import annotations

from distilvlm.models.alone import Encoder
from distilvlm.models.vlm import VLM, VisionLayout
from distilvlm.recipe import Recipe, TeacherSpec
from distilvlm.teachers import TeacherError
from distilvlm.teachers.own_rows import require_comparable_pictures

from .finding import Finding
from .vocabulary import teachers_terms


def check(recipe: Recipe, student: VLM | Encoder, teacher: VLM | None) -> list[Finding]:
    """Size, tokens, layer and selection of both models."""
    found = [Finding("visual.tokens", "ok", f"student: {_described(student.layout)}")]
    if teacher is None:
        return found
    stages = [stage.name for stage in recipe.stages if stage.loss.needs_teacher]
    ours, theirs = student.layout, teacher.layout
    if ours == theirs:
        return [Finding("visual.tokens", "ok", f"student and teacher: {_described(ours)}")]
    if not stages or (ours.visual == theirs.visual and ours.size == theirs.size):
        return [*found, Finding("visual.tokens", "ok", f"teacher: {_described(theirs)}")]
    spec = recipe.teacher
    if spec is not None and spec.visual != "same":
        return [*found, _made_comparable(spec, ours, theirs)]
    text = f"student: {_described(ours)}; teacher: {_described(theirs)}: their rows can't be paired"
    fix = (
        f"give the student the teacher's vision encoder, size ({theirs.size}) and select ('{theirs.select}'), set "
        f"{teachers_terms(recipe)} to 0 in {', '.join(stages)}, or let the teacher have its own (teacher.visual: "
        "interpolate)"
    )
    return [Finding("visual.tokens", "error", text, fix)]


def _made_comparable(spec: TeacherSpec, ours: VisionLayout, theirs: VisionLayout) -> Finding:
    """Other visual tokens of a teacher that may have them."""
    try:
        require_comparable_pictures(spec, theirs, ours)
    except TeacherError as error:
        text, _, fix = str(error).rpartition(": ")
        return Finding("visual.tokens", "error", text, fix)
    return Finding("visual.tokens", "ok", f"teacher: {_described(theirs)}, compared by {spec.visual}")


def other_tower(recipe: Recipe) -> Finding:
    """Kept features, and a teacher that does not share the tower that makes them: it would see nothing."""
    text = f"'{recipe.pictures.features}' keeps features of the student's vision tower, and the teacher has another one"
    return Finding("visual.features", "error", text, "remove pictures.features")


def _described(layout: VisionLayout) -> str:
    """As in '384 px = 728 visual tokens + 1 register (hidden state -2, select default)'."""
    visual = sum(layout.visual)
    others = layout.placeholders - visual
    registers = "" if not others else f" + {others} CLS or register tokens"
    return f"{layout.size} px = {visual} visual tokens{registers} (hidden state {layout.layer}, select {layout.select})"
