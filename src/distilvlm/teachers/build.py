"""The teacher that a recipe names, wherever it is: a stage relies on the protocol (interface.py), not on a kind."""

from __future__ import annotations

import torch

from distilvlm.models import NotHere
from distilvlm.models.compose import build
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe

from .cache import TeacherCache
from .cached import CachedTeacher
from .interface import TeacherError
from .loading import local_teacher
from .local import LocalTeacher
from .remote import PromptedTeacher, RemoteTeacher


def open_teacher(
    recipe: Recipe, student: VLM, student_device: torch.device, preferences: bool = False
) -> LocalTeacher | CachedTeacher | RemoteTeacher | PromptedTeacher:
    """The recipe's teacher for a student that will be on `student_device`.

    Args:
        preferences: for a stage of these, of which a run keeps all that the teacher says in its own directory: a cached
            teacher is then asked in this process, once.

    Raises:
        TeacherError: it can't teach this student, or not as the recipe has it; says what to change.
        FeatureError: its cache was made otherwise.
    """
    spec = recipe.teacher
    assert spec is not None  # the schema refuses a teacher's term without a teacher
    if spec.kind == "cached" and not preferences:
        return CachedTeacher(TeacherCache(recipe, student, student_device))
    if spec.remote is not None and spec.kind == "remote":
        kind = RemoteTeacher if spec.remote.protocol == "distilvlm" else PromptedTeacher
        teacher = kind(spec, student, student_device, _outline(recipe))
    else:
        teacher = local_teacher(recipe, student, student_device)
    if recipe.pictures.features is not None and not teacher.shares_vision:
        raise TeacherError(
            "'pictures.features' keeps the features of the student's vision tower, and the teacher has another one: "
            "remove 'pictures.features', or keep what the teacher gives (teacher: {kind: cached})"
        )
    return teacher


def _outline(recipe: Recipe) -> VLM | None:
    """The teacher without weights, where its files are here: those of one elsewhere need not be."""
    assert recipe.teacher is not None
    try:
        return build(recipe.teacher, recipe.seed, meta=True)
    except NotHere:
        return None
