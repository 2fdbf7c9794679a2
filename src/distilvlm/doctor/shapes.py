"""The student as each stage trains it, as far as it can become that."""

from __future__ import annotations

from distilvlm.models.stages import Student, along
from distilvlm.recipe import Recipe

from .finding import Finding


def shapes(recipe: Recipe, student: Student) -> tuple[dict[str, Student], list[Finding]]:
    """Stage -> the student as it trains there, without weights from the first upcycle, insert or mix on; where it
    cannot become that, the stages before, and why."""
    found: dict[str, Student] = {}
    try:
        for stage, trained in along(recipe, student):
            found[stage.name] = trained
    except ValueError as error:
        stage = recipe.stages[len(found)]
        check = "experts.upcycle"
        fix = "take a dense Llama (SmolLM2) or Qwen2 student, and layers that it has, or remove the transform"
        if stage.inserts is not None:
            check, fix = "adaptors.insert", "give layers and a start that the student has, and a name of its own"
        elif stage.mixes is not None and stage.upcycles is None:
            fix = "name layers that come before the one that is read (vision.layer), or remove the transform"
        return found, [Finding(check, "error", str(error), fix, stage.name)]
    return found, []
