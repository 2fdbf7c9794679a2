"""What vision encoders teach: does the term have something to say, and to whom; is a tower's mixture able to learn?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distilvlm.data import DataError, Sample, StageData
from distilvlm.data.collate import collate
from distilvlm.models.alone import Encoder
from distilvlm.models.encoders import Seen
from distilvlm.models.mixture import mixtures
from distilvlm.models.parts import Parameters
from distilvlm.models.vlm import VLM
from distilvlm.recipe import TERMS, ComparisonSpec, Recipe, StageSpec
from distilvlm.teachers.encoders import Look, Shape, moved, used
from distilvlm.train import Task, objective_of
from distilvlm.train.encoders import Comparison, rules_of

from . import parts
from .finding import Finding
from .template import spread
from .trial import CANDIDATES, norms, perturbed

OURS = ("encoder", "expert_balance")
ROUTER, EXPERTS = "vision.router", "vision.experts"
TRIED = 2
"""Samples with pictures that the terms are tried on."""


@dataclass(frozen=True)
class Trial:
    """One term on a few pictures."""

    value: float
    details: Mapping[str, float]  # of the encoder term, what each teacher gives
    gradients: Mapping[str, float]  # norms per leaf part, for a student that is a little off


def check(recipe: Recipe, students: Mapping[str, VLM | Encoder]) -> list[Finding]:
    """What can be said of encoders and mixtures without computing. `students`: stage -> the student as it trains there,
    as far as it can be had; it may be without weights."""
    found = [
        Finding("settings.unused", "ok", f"encoder '{name}' is used by no stage")
        for name in recipe.encoders
        if name not in used(recipe)
    ]
    for stage in recipe.stages:
        if stage.mixes is not None:
            found.append(Finding("mixture.mix", "ok", _told(stage), stage=stage.name))
        if stage.loss.encoder:
            found += _rules(stage)
        elif stage.encoder != ComparisonSpec():
            text = "the stage says how it compares with encoders, and loss.encoder is 0: it doesn't"
            fix = f"give stages.{stage.name}.loss.encoder a weight (MoVE-KD's: 0.5), or remove its encoder section"
            found.append(Finding("encoders.rules", "warning", text, fix, stage.name))
        if stage.name in students:
            found += _mixture(recipe, stage, students[stage.name])
    return found


def try_terms(
    recipe: Recipe,
    stage: StageSpec,
    student: VLM | Encoder,
    leaves: Mapping[str, Parameters],
    data: StageData,
    shapes: Mapping[str, Shape],
    look: Look | None,
) -> dict[str, Trial]:
    """The stage's terms of pictures, on a few of them. To be called within `trial.untouched`.

    Args:
        leaves: leaf part -> parameters that train.
        look: None where the encoders cannot be had: the balance of experts is tried alone.
    """
    samples, paths = _samples(data)
    objective = objective_of(stage)
    enabled = [name for name in OURS if getattr(objective, name) and (name != "encoder" or look is not None)]
    if not samples or not enabled:
        return {}
    student.model.requires_grad_(False)
    for members in leaves.values():
        for parameter in members.values():
            parameter.requires_grad_(True)
    student.model.eval()
    batch = collate(samples).to(student.model.device)
    seen: dict[str, Seen] = {}
    if look is not None and objective.encoder:
        seen = {name: moved(one, student.model.device) for name, one in look(paths, stage).items()}

    def run(name: str) -> dict[str, Tensor]:
        alone = replace(objective, **{other: 0.0 for other in TERMS if other != name})
        comparison = Comparison(recipe, stage, shapes) if name == "encoder" else None
        task = Task(student, alone, None, comparison).eval()
        result = task(batch, batch.features, None, batch.response_rows[:0], batch.samples, seen=seen)
        return {"loss": result["loss"], **result["terms"]}

    found: dict[str, Trial] = {}
    for name in enabled:
        with torch.no_grad():
            terms = {key: float(value) for key, value in run(name).items() if key != "loss"}
        with perturbed(leaves):
            gradients = norms(student.trees, leaves, run(name)["loss"])
        details = {key.partition(".")[2]: value for key, value in terms.items() if key.startswith("encoder.")}
        found[name] = Trial(terms[name], details, gradients)
    return found


def findings(stage: StageSpec, trials: Mapping[str, Trial], student: VLM | Encoder) -> Iterator[Finding]:
    """What the trials say."""
    for name, trial in trials.items():
        weight = getattr(stage.loss, name)
        if not all(math.isfinite(value) for value in (trial.value, *trial.gradients.values())):
            text = f"{name}: not a finite number, or not a finite gradient, before the first step"
            fix = "look for weights that are not finite in the student's and the encoders' files"
            yield Finding("terms.finite", "error", text, fix, stage.name)
            continue
        if trial.value <= 0:
            text = "encoder: 0, so the student is what its teachers are: there is nothing to learn"
            fix = f"name another teacher in encoders, or set stages.{stage.name}.loss.encoder to 0"
            yield Finding("terms.positive", "error", text, fix, stage.name)
            continue
        text = f"{name} × {weight:g}: {trial.value:.3g}"
        if trial.details:
            text += f" ({', '.join(f'{teacher} {value:.3g}' for teacher, value in trial.details.items())})"
        if name == "expert_balance":
            routed = next(one for one in mixtures(student.model) if one.count > 1)
            text += f" ({1 / routed.count:.3g} where experts serve alike)"
        reached = ", ".join(f"{leaf} {norm:.2g}" for leaf, norm in trial.gradients.items() if norm) or "none"
        yield Finding(f"terms.{name}", "ok", f"{text}; gradient: {reached}", stage=stage.name)


def _told(stage: StageSpec) -> str:
    how = stage.mixes
    assert how is not None
    same = (
        "the tower gives what it gave" if how.start == "zero" else "the tower is another one at once, as the method's"
    )
    return f"{how}; started by {how.start}: {same}"


def _rules(stage: StageSpec) -> Iterator[Finding]:
    rules, how = rules_of(stage), stage.encoder
    text = (
        f"preset {how.preset}: token weights {rules.token_weights}, teacher weights {rules.teacher_weights}, adapters "
        f"{rules.adapter} on the {rules.side}'s side"
    )
    if rules.side == "teacher":
        text += (
            ": the target moves with them, and may settle on what all pictures have in common. Measure the finished "
            "encoder against predicting the mean (feature_error), or try encoder.side: student"
        )
    yield Finding("encoders.rules", "ok", text, stage=stage.name)
    if rules.teacher_weights == "reference":
        text = (
            "teacher weights 'reference' are decided by each micro-batch: another machine.micro_batch or "
            "machine.tokens is another loss"
        )
        yield Finding("encoders.rules", "ok", text, stage=stage.name)


def _mixture(recipe: Recipe, stage: StageSpec, student: VLM | Encoder) -> Iterator[Finding]:
    found = mixtures(student.model)
    routed = [one for one in found if one.count > 1]
    if stage.loss.expert_balance and not routed:
        text = f"loss.expert_balance is {stage.loss.expert_balance:g}, but no layer of the tower has several experts"
        fix = f"set stages.{stage.name}.loss.expert_balance to 0, or mix experts in here or before (do: mix)"
        yield Finding("mixture.balance", "error", text, fix, stage.name)
    if not found:
        return
    trained = {leaf for leaf in (ROUTER, EXPERTS) if parts.owner(leaf, stage.train)}
    if stage.loss.expert_balance and routed and not any(parts.owner(leaf, stage.train) for leaf in ("vision", ROUTER)):
        text = "loss.expert_balance is of routers, and neither they nor the tower below them train"
        fix = f"add '{ROUTER}' to stages.{stage.name}.train, or set loss.expert_balance to 0"
        yield Finding("mixture.balance", "error" if EXPERTS not in trained else "warning", text, fix, stage.name)
    if ROUTER in trained and routed and not stage.loss.expert_balance and routed[0].routing == "top1":
        text = (
            "routers train, but nothing moves them: an expert is chosen and not weighed, so only the balance reaches it"
        )
        fix = f"set stages.{stage.name}.loss.expert_balance to 0.01 (MoVE-KD's code), or mix with routing: top1_scaled"
        yield Finding("mixture.router", "warning", text, fix, stage.name)
    if stage.mixes is not None:
        later = recipe.stages[recipe.stages.index(stage) :]
        if not any(parts.owner(EXPERTS, other.train) for other in later):
            text = f"'{EXPERTS}' trains neither here nor in a later stage: what was drawn stays"
            fix = f"add '{EXPERTS}' to stages.{stage.name}.train"
            yield Finding("mixture.frozen", "warning", text, fix, stage.name)


def _samples(data: StageData) -> tuple[list[Sample], list[str]]:
    """A few samples with pictures, and the files of these."""
    samples: list[Sample] = []
    paths: list[str] = []
    for index in spread(np.flatnonzero(data.picture_counts > 0), CANDIDATES):
        if len(samples) == TRIED:
            break
        with contextlib.suppress(DataError):  # what can't be used is reported by name elsewhere
            sample = data[0, index]
            if sample.weight:
                samples.append(sample)
                paths += data.record(index).images
    return samples, paths
