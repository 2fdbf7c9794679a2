"""What the stages of a recipe make of a student: where it becomes sparse, and how its routers choose in each stage."""

from __future__ import annotations

from distilvlm.recipe.schema import Recipe, StageSpec, Upcycle

from . import routing
from .routing import SecondExpert
from .upcycling import upcycle
from .vlm import VLM

Choosing = tuple[SecondExpert, float | None]
"""How a token's later experts are chosen, and an expert's capacity; None drops nothing."""

REFERENCE_CAPACITY = 1.5
"""Of an expert in training, in LLaVA-MoD's scripts."""


def upcycle_before(recipe: Recipe, stage: StageSpec) -> Upcycle | None:
    """How the student that `stage` trains was made sparse, by it or by an earlier stage; None for a dense one."""
    for earlier in recipe.stages:
        if earlier.upcycles is not None:
            return earlier.upcycles
        if earlier.name == stage.name:
            break
    return None


def made_sparse(vlm: VLM, how: Upcycle, seed: int) -> VLM:
    """A sparse student that equals `vlm` and shares what is not a feed-forward. Raises ValueError as `upcycle`."""
    return upcycle(vlm, how.experts, how.top_k, how.layers, seed)


def choosing(recipe: Recipe, stage: StageSpec) -> Choosing:
    """How the routers of a sparse student choose in training in `stage`, as `routing.install` takes it."""
    how = upcycle_before(recipe, stage)
    second: SecondExpert = "argmax" if how is None else how.second_expert
    capacity = None if how is None else how.capacity
    return (
        "gumbel" if "gumbel" in stage.reference else second,
        REFERENCE_CAPACITY if "capacity" in stage.reference else capacity,
    )


def students(recipe: Recipe, student: VLM) -> dict[str, VLM]:
    """Stage -> the student as it trains there: `student` itself, and from the upcycle on a sparse one without weights.

    Raises:
        ValueError: the student cannot be upcycled as the recipe wants it, or is a sparse one of another origin.
    """
    if getattr(student.model.config.get_text_config(), "num_experts", None):
        routing.install(student.without_weights().model)
    found: dict[str, VLM] = {}
    for stage in recipe.stages:
        if stage.upcycles is not None:
            student = made_sparse(student.without_weights(), stage.upcycles, recipe.seed)
        found[stage.name] = student
    return found
