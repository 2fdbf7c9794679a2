"""The teacher that a recipe names, in this process."""

from __future__ import annotations

import torch

from distilvlm.models.compose import build
from distilvlm.models.quantised import quantise, require_possible
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe

from .local import LocalTeacher


def weights_of(recipe: Recipe) -> VLM:
    """The model with its weights, in the precision that the recipe wants; one whose language model shall be quantised
    in bf16, which `local_teacher` changes. Errors as `models.compose.build`."""
    assert recipe.teacher is not None  # the schema refuses a teacher's term without a teacher
    dtype = torch.bfloat16 if recipe.teacher.held == "bf16" else torch.float32
    return build(recipe.teacher, recipe.seed, dtype=dtype)


def local_teacher(recipe: Recipe, student: VLM, student_device: torch.device, vlm: VLM | None = None) -> LocalTeacher:
    """The recipe's teacher for a student that will be on `student_device`.

    Args:
        vlm: as `weights_of` gave it, if it was loaded already.

    Raises:
        TeacherError: the two cannot be compared row by row.
        ValueError: its language model can't be quantised on its device.
    """
    spec = recipe.teacher
    assert spec is not None
    device = torch.device(spec.device) if spec.device else student_device
    if spec.bits is not None:
        require_possible(spec.bits, device)  # before minutes of loading
    vlm = vlm or weights_of(recipe)
    if spec.bits is not None:
        quantise(vlm, spec.bits, device)
    trains = any(name.partition(".")[0] == "vision" for stage in recipe.stages for name in stage.train)
    return LocalTeacher(
        vlm,
        student,
        device=device,
        student_device=student_device,
        share_vision=not trains,
        spec=spec,
    )
