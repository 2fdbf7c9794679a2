"""What the stages of a recipe make of a student: where it becomes sparse, how its routers choose in each stage, where
it gets adaptors, and where its tower gets experts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TypeVar, cast

from torch import Tensor, nn

from distilvlm.recipe.encoders import Mix
from distilvlm.recipe.schema import Recipe, StageSpec
from distilvlm.recipe.transforms import Insert, Upcycle

from . import routing
from .adaptors import AdaptorConfig, Host, resolve
from .alone import Encoder
from .mixture import MixConfig, mix
from .routing import SecondExpert
from .upcycling import upcycle
from .vlm import VLM

Student = TypeVar("Student", bound=VLM | Encoder)

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
    sparse = upcycle(vlm, how.experts, how.top_k, how.layers, seed)
    if (adapters := getattr(vlm.model, "adapters", None)) is not None:
        sparse.model.adapters = adapters
    return sparse


def mixed(student: Student, how: Mix, seed: int) -> Student:
    """The student, whose tower has got experts; its other weights are what they were. Raises ValueError as `mix`."""
    config = MixConfig(**{field.name: getattr(how, field.name) for field in fields(MixConfig)})
    tower = student.model.model.vision_tower
    mix(tower, config, student.layout.layer, seed)
    if isinstance(student, VLM):
        student.model.config.vision_config = tower.config  # an upcycled Llava has a copy
    return student


def with_own_tower(student: Student) -> Student:
    """A student that shares all but the tower, which is a copy: what is done to it changes the other no more."""
    tower = {id(tensor) for tensor in _tensors(student.model.model.vision_tower)}
    shared = {id(tensor): tensor for tensor in _tensors(student.model) if id(tensor) not in tower}
    return cast(Student, replace(student, model=copy.deepcopy(student.model, dict(shared))))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


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


def students(recipe: Recipe, student: Student) -> dict[str, Student]:
    """Stage -> the student as it trains there: `student` itself, and from the first upcycle, insert or mix on one
    without weights.

    Raises:
        ValueError: as `along`.
    """
    return {stage.name: trained for stage, trained in along(recipe, student)}


def along(recipe: Recipe, student: Student) -> Iterator[tuple[StageSpec, Student]]:
    """Every stage with the student as it trains there, as `students` has it; those behind one that raises are missing.

    Raises:
        ValueError: the student cannot be upcycled or mixed as the recipe wants it, is a sparse one of another origin,
            or has no place for an adaptor of a stage.
    """
    if getattr(student.model.config.get_text_config(), "num_experts", None):
        routing.install(student.without_weights().model)
    for stage in recipe.stages:
        if stage.upcycles is not None or stage.inserts is not None or stage.mixes is not None:
            student = cast(Student, student.without_weights())
        if stage.upcycles is not None:
            dense = _with_language(student, stage, "upcycles")
            student = cast(Student, made_sparse(dense, stage.upcycles, recipe.seed))
        if stage.inserts is not None:
            student = cast(Student, with_adaptor(_with_language(student, stage, "adapts"), stage.inserts))
        if stage.mixes is not None:
            student = mixed(student, stage.mixes, recipe.seed)
        yield stage, student


def _with_language(student: VLM | Encoder, stage: StageSpec, does: str) -> VLM:
    if isinstance(student, Encoder):
        raise ValueError(f"stage '{stage.name}' {does} a language model, and the student is an encoder alone")
    return student
