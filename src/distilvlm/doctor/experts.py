"""A student that becomes sparse: what its experts and routers are, and whether they can do their work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distilvlm.models.alone import Encoder
from distilvlm.models.upcycling import active_parameters, upcycled_layers
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec

from . import parts
from .finding import Finding

ROUTER, EXPERTS = "language.router", "language.feed_forward"


def check(recipe: Recipe, shapes: Mapping[str, VLM | Encoder]) -> list[Finding]:
    """Every stage that trains a sparse student; `shapes` as shapes.py gives them."""
    found: list[Finding] = []
    for stage in recipe.stages:
        if stage.name not in shapes:
            continue
        layers = upcycled_layers(shapes[stage.name].model.config)
        if stage.upcycles is not None:
            found += [_told(stage, shapes[stage.name], layers), *_upcycle(recipe, stage)]
        found += _balance(recipe, stage, bool(layers))
    return found


def _told(stage: StageSpec, student: VLM | Encoder, layers: list[int]) -> Finding:
    total, active = active_parameters(student.model)
    numbers = ", ".join(map(str, layers))
    text = f"{stage.upcycles}; layers {numbers}. From here on {total:,} parameters, of which {active:,} serve a token"
    return Finding("experts.upcycle", "ok", text, stage=stage.name)


def _upcycle(recipe: Recipe, stage: StageSpec) -> Iterator[Finding]:
    how = stage.upcycles
    assert how is not None
    if how.top_k == how.experts:
        text = f"top_k is the number of experts ({how.experts}): all of them serve every token, as one layer would"
        fix = "set top_k below experts; LLaVA-MoD has 2 of 4"
        yield Finding("experts.all", "warning", text, fix, stage.name)
    if how.top_k == 1:
        text = "top_k is 1: the one expert's weight is always 1, so that no term but the balance teaches the routers"
        fix = "set top_k to 2 (LLaVA-MoD's)"
        yield Finding("experts.single", "warning", text, fix, stage.name)
    later = recipe.stages[recipe.stages.index(stage) :]
    for part, check, why in (
        (ROUTER, "experts.routers", "routers stay as they were drawn: which expert serves a token is left to chance"),
        (EXPERTS, "experts.frozen", "experts stay equal copies of one feed-forward: which of them serves is no matter"),
    ):
        if not any(parts.owner(part, other.train) for other in later):
            text = f"'{part}' trains neither here nor in a later stage: {why}"
            fix = f"add '{part}' to stages.{stage.name}.train"
            yield Finding(check, "warning", text, fix, stage.name)


def _balance(recipe: Recipe, stage: StageSpec, sparse: bool) -> Iterator[Finding]:
    if stage.loss.balance and not sparse:
        text = f"loss.balance is {stage.loss.balance:g}, but the student has no experts in this stage: it is dense"
        fix = f"set stages.{stage.name}.loss.balance to 0, or upcycle the student here or before"
        if any(other.upcycles is not None for other in recipe.stages):
            fix = f"set stages.{stage.name}.loss.balance to 0: the student becomes sparse in a later stage"
        yield Finding("experts.balance", "error", text, fix, stage.name)
    if sparse and not stage.loss.balance and parts.owner(ROUTER, stage.train):
        text = "routers train without a balance term: experts may collapse, so that a few serve all tokens"
        fix = f"set stages.{stage.name}.loss.balance to 0.01 (LLaVA-MoD's code)"
        yield Finding("experts.collapse", "warning", text, fix, stage.name)
