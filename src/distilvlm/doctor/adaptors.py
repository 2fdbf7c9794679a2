"""A student that gets adaptors beside a frozen language model: what they are, and whether they can do their work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distilvlm.models.alone import Encoder
from distilvlm.models.parts import sizes
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Insert, Recipe, StageSpec

from . import parts
from .finding import Finding

LAYERS = "adaptor.layers"

RATE = 1e-3
"""From here on layers in the frozen model's path are said to lose their way: the published first stage has this rate
for the projector alone, and the one that trains adaptors 2e-5."""


def check(recipe: Recipe, shapes: Mapping[str, VLM | Encoder]) -> list[Finding]:
    """Every stage that trains adaptors; `shapes` as shapes.py gives them."""
    found: list[Finding] = []
    for stage in recipe.stages:
        student = shapes.get(stage.name)
        if not isinstance(student, VLM):
            continue
        if stage.inserts is not None:
            found += [*_told(stage, stage.inserts, student), *_idle(recipe, stage, stage.inserts)]
        if student.adaptors:
            found += _rate(stage, student)
    return found


def _told(stage: StageSpec, how: Insert, student: VLM) -> Iterator[Finding]:
    host = student.host
    assert host is not None
    behind = ", ".join(map(str, host[how.adaptor].config.positions))
    total, serving = sizes(student.model)
    where = "" if isinstance(how.layers, list) else f", behind {behind}"
    text = (
        f"{how}{where}: {host.bytes(how.adaptor):,} bytes. From here on {total:,} parameters, of which "
        f"{serving:,} serve a token under '{how.adaptor}'; the base stays as it is"
    )
    yield Finding("adaptors.insert", "ok", text, stage=stage.name)
    if how.structure == "c" and how.start == "base":
        text = (
            f"'{how.adaptor}' begins as the base with layers {behind} run twice, which is no language model yet: a "
            "first loss far above the base's is expected"
        )
        yield Finding("adaptors.start", "ok", text, stage=stage.name)


def _idle(recipe: Recipe, stage: StageSpec, how: Insert) -> Iterator[Finding]:
    """Layers that are copies and stay copies."""
    later = recipe.stages[recipe.stages.index(stage) :]
    own = [other for other in later if other is stage or other.inserts is None]
    if any(parts.owner(LAYERS, other.train) for other in own):
        return
    what = "run the frozen layers twice" if how.structure == "c" else "are shut out by gates of zero"
    text = f"'{LAYERS}' of '{how.adaptor}' trains neither here nor in a later stage: its layers {what}"
    yield Finding("adaptors.frozen", "warning", text, f"add 'adaptor' to stages.{stage.name}.train", stage.name)


def _rate(stage: StageSpec, student: VLM) -> Iterator[Finding]:
    part = parts.owner(LAYERS, stage.train)
    if part is None or student.host is None:
        return
    rate = stage.optim.rates.get(part, stage.optim.lr)
    if rate >= RATE and student.host[student.adaptors[-1]].config.structure == "c":
        text = (
            f"{LAYERS} trains at {rate:g}: inserted layers stand in the model's path and lose their way at high rates"
        )
        fix = (
            f"set stages.{stage.name}.optim.lr lower (published: 2e-5), and give the projector its own rate: train "
            "[adaptor, adaptor.projector], rates {adaptor.projector: 1e-3}"
        )
        yield Finding("adaptors.rate", "warning", text, fix, stage.name)
