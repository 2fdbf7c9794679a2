"""The student as each stage trains it, as far as it can become that."""

from __future__ import annotations

from distilvlm.models.stages import along
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe

from .finding import Finding


def shapes(recipe: Recipe, student: VLM) -> tuple[dict[str, VLM], list[Finding]]:
    """Stage -> the student as it trains there, without weights from the first upcycle or insert on; where it cannot
    become that, the stages before, and why."""
    found: dict[str, VLM] = {}
    try:
        for stage, trained in along(recipe, student):
            found[stage.name] = trained
    except ValueError as error:
        stage = recipe.stages[len(found)]
        check = "experts.upcycle"
        fix = "take a dense Llama (SmolLM2) or Qwen2 student, and layers that it has, or remove the transform"
        if stage.inserts is not None:
            check, fix = "adaptors.insert", "give layers and a start that the student has, and a name of its own"
        return found, [Finding(check, "error", str(error), fix, stage.name)]
    return found, []
