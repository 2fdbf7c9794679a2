"""What the stages of a recipe make of a student: where it becomes sparse, how its routers choose in each stage, where
it gets adaptors."""

from __future__ import annotations

from collections.abc import Iterator

from distilvlm.recipe.schema import Recipe, StageSpec
from distilvlm.recipe.transforms import Insert, Upcycle

from . import routing
from .adaptors import AdaptorConfig, Host, resolve
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


def with_adaptor(vlm: VLM, how: Insert) -> VLM:
    """Insert an adaptor into the student, in place, and make it the active one; returns the student.

    Raises:
        ValueError: positions that the language model does not have; a name that is taken; no such start.
    """
    depth: int = vlm.model.config.get_text_config().num_hidden_layers
    config = AdaptorConfig(
        structure=how.structure,
        gate=how.gate,
        positions=resolve(how.layers, depth),
        own_embedding=how.embedding,
        own_norm=how.norm,
        own_head=how.head,
        tied=how.tied,
        projector=how.projector,
    )
    Host.attach(vlm.model).add(how.adaptor, config, start=how.start)
    return vlm.use(how.adaptor)


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
    """Stage -> the student as it trains there: `student` itself, and from the first upcycle or insert on one without
    weights.

    Raises:
        ValueError: as `along`.
    """
    return {stage.name: trained for stage, trained in along(recipe, student)}


def along(recipe: Recipe, student: VLM) -> Iterator[tuple[StageSpec, VLM]]:
    """Every stage with the student as it trains there, as `students` has it; those behind one that raises are missing.

    Raises:
        ValueError: the student cannot be upcycled as the recipe wants it, is a sparse one of another origin, or has no
            place for an adaptor of a stage.
    """
    if getattr(student.model.config.get_text_config(), "num_experts", None):
        routing.install(student.without_weights().model)
    for stage in recipe.stages:
        if stage.upcycles is not None:
            student = made_sparse(student.without_weights(), stage.upcycles, recipe.seed)
        if stage.inserts is not None:
            student = with_adaptor(student.without_weights(), stage.inserts)
        yield stage, student
