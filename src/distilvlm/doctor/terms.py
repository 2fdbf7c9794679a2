"""Does each loss term do its work: rows, zero for equals, more for unequals, a gradient for every part that trains?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from distilvlm.data import StageData
from distilvlm.losses.preference import PAIRED
from distilvlm.models import routing
from distilvlm.models.alone import Encoder
from distilvlm.models.parts import Parameters, named
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec
from distilvlm.teachers import Teacher
from distilvlm.teachers.encoders import Look, Shape
from distilvlm.train import objective_of

from . import encoders, parts
from .finding import Finding
from .trial import Distance, TermTrial, samples_of, try_terms

ZERO = {4: 1e-4, 2: 2e-2}
"""Bytes of a weight -> what counts as nothing, in nats (relation: of a cosine): rounding of sums over a vocabulary."""

FOR_ENCODERS = ("adapters", encoders.ROUTER)
"""Parts that terms of language cannot reach, and are not meant to."""

FLAT = 0.1
"""A preference loss with less of its slope than this share has next to nothing to say to the student."""


def check(
    recipe: Recipe,
    stage: StageSpec,
    student: VLM | Encoder,
    teacher: Teacher | None,
    data: StageData,
    shapes: Mapping[str, Shape],
    look: Look | None,
) -> list[Finding]:
    """Every enabled term of `stage` on a few samples. To be called within `trial.untouched`. `shapes`, `look`: of the
    encoders, as `encoders.try_terms` takes them."""
    leaves = parts.trained(student, stage.train)
    found: list[Finding] = []
    reach: dict[str, dict[str, float]] = {}
    if isinstance(student, VLM) and not stage.pictures_alone:
        found += _of_language(recipe, stage, student, teacher, data, leaves, reach)
    pictures = encoders.try_terms(recipe, stage, student, leaves, data, shapes, look)
    found += encoders.findings(stage, pictures, student)
    reach |= {name: dict(trial.gradients) for name, trial in pictures.items()}
    if stage.loss.encoder and look is None:
        return found  # what reaches which part cannot be told
    return [*found, *_reach(stage, reach)]


def _of_language(
    recipe: Recipe,
    stage: StageSpec,
    student: VLM,
    teacher: Teacher | None,
    data: StageData,
    leaves: Mapping[str, Parameters],
    reach: dict[str, dict[str, float]],
) -> list[Finding]:
    """The terms that need the language model; `reach` learns which parts each of them reaches."""
    samples = samples_of(data)
    if not samples:
        return []  # none can be loaded: the rows' own findings say why
    needed = teacher if stage.loss.needs_teacher else None
    first = recipe.stages[0].name == stage.name
    objective = replace(objective_of(stage, recipe.teacher), encoder=0.0, expert_balance=0.0)
    trials = try_terms(student, needed, objective, leaves, samples)
    width = min(p.dtype.itemsize for members in leaves.values() for p in members.values())
    found: list[Finding] = []
    for name, trial in trials.items():
        problem = _problem(stage, name, trial, ZERO.get(width, 1e-4))
        if problem is None:
            reach[name] = dict(trial.gradients)
            found.append(_ok(stage, name, trial, needed is not None, _even(stage, student)))
            if first and trial.distance is not None:  # of later stages, earlier ones change the student
                found += _saturated(stage, trial.distance)
        else:
            found.append(problem)
    if needed is not None and needed.vlm is not None and first and same_weights(student, needed.vlm):
        text = "teacher and student have the same weights: the teacher's terms begin at 0 and have nothing to teach"
        found.append(Finding("terms.same", "warning", text, "name another teacher (teacher.from)", stage.name))
    return found


def _problem(stage: StageSpec, name: str, trial: TermTrial, zero: float) -> Finding | None:
    def error(check: str, text: str, fix: str) -> Finding:
        return Finding(check, "error", f"{name}: {text}", fix, stage.name)

    if not trial.rows:
        what = "rows with pictures" if name in ("visual", "relation") else "rows with answers"
        text = f"no rows: none of the data has {what.removeprefix('rows with ')}"
        return error("terms.rows", text, f"add {what} to stages.{stage.name}.data, or set loss.{name} to 0")
    values = (trial.value, trial.itself, trial.perturbed, *trial.gradients.values())
    if not all(math.isfinite(value) for value in values):
        text = "not a finite number, or not a finite gradient, before the first step"
        return error("terms.finite", text, "look for weights that are not finite in the student's and teacher's files")
    ours = "this is a fault of the package, please report it with the recipe"
    if name == "text":
        return None
    if name == "balance":
        return None if trial.value > 0 else error("terms.positive", f"{trial.value:.3g}, which is never below 1", ours)
    equal = 0.0 if trial.distance is None else trial.distance.equal
    if abs(trial.itself - equal) > zero:
        text = f"{trial.itself:.3g} for a student that is its own teacher, which must give {equal:.3g}"
        return error("terms.zero", text, ours)
    if name == "preference":
        return None
    if trial.perturbed <= max(0.0, trial.itself):
        text = f"a student that is off loses nothing by it ({trial.perturbed:.2g}): the term can't teach"
        fix = f"set loss.temperature (now {stage.loss.temperature:g}) near 1"
        if name == "relation":
            fix = "set loss.relation to 0: the visual tokens of these pictures are all alike to the student"
        return error("terms.positive", text, fix)
    return None


def _even(stage: StageSpec, student: VLM) -> int:
    """The balance loss of experts that serve alike: 1 per sparse layer and answer that is learned."""
    answers = 2 if stage.loss.preference and stage.loss.preference_kind in PAIRED else 1
    return len(routing.routers(student.model)) * answers


def _ok(stage: StageSpec, name: str, trial: TermTrial, teacher: bool, even: int) -> Finding:
    against = " against the teacher" if teacher and name not in ("text", "balance") else ""
    kind = f" ({stage.loss.preference_kind}, β {stage.loss.beta:g})" if name == "preference" else ""
    text = f"{name}{kind} × {stage.loss.told(name)}: {trial.rows} rows, {trial.value:.3g}{against}"
    if name == "balance":
        text += f" ({even} where experts serve alike)"
    elif trial.distance is not None:
        text += f", {trial.distance.equal:.3g} for equals; β · |log-ratio| is {trial.distance.scaled:.2g} today"
    elif name != "text":
        text += f"; {abs(trial.itself):.1g} against itself, {trial.perturbed:.2g} when off"
    gradients = ", ".join(f"{part} {norm:.2g}" for part, norm in _by_owner(stage, trial.gradients).items())
    only = " (it moves routers and what lies below them, and nothing else)" if name == "balance" else ""
    return Finding(f"terms.{name}", "ok", f"{text}; gradient: {gradients}{only}", stage=stage.name)


def _saturated(stage: StageSpec, distance: Distance) -> Iterator[Finding]:
    """A loss that is flat where the student's answers begin."""
    if distance.slope < FLAT:
        loss = stage.loss
        text = (
            f"the student is far from its reference: β · |log-ratio| is {distance.scaled:.3g} on the answers tried, "
            f"where the loss ({loss.preference_kind}) has {distance.slope:.1%} of its slope: it hardly teaches"
        )
        fix = (
            f"set stages.{stage.name}.loss.beta to {loss.beta / distance.scaled:.1g} (now {loss.beta:g}), or distil "
            "the student from this teacher before"
        )
        yield Finding("terms.saturated", "warning", text, fix, stage.name)


def _by_owner(stage: StageSpec, gradients: Mapping[str, float]) -> dict[str, float]:
    """Norms of the parts as the stage names them."""
    squares: dict[str, float] = {name: 0.0 for name in stage.train}
    for leaf, norm in gradients.items():
        squares[str(parts.owner(leaf, stage.train))] += norm**2
    return {name: math.sqrt(square) for name, square in squares.items()}


def _reach(stage: StageSpec, gradients: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
    """Parts that no term moves are errors; those that one term alone does not move are warnings."""
    if not gradients:
        return
    leaves = next(iter(gradients.values()))
    unmoved = [leaf for leaf in leaves if not any(norms[leaf] for norms in gradients.values())]
    for leaf in unmoved:
        if leaf == encoders.ROUTER:  # is told with its mixture
            continue
        part = parts.owner(leaf, stage.train)
        fix = f"take '{part}' out of stages.{stage.name}.train, or train it on rows that reach it"
        if leaf in ("projector", "vision"):
            fix = f"add rows with pictures to stages.{stage.name}.data, or take '{part}' out of its train list"
        yield Finding(
            "terms.gradient", "error", f"no loss term gives {leaf} a gradient: it can't learn", fix, stage.name
        )
    for name, norms in gradients.items():
        moved = {leaf: norm for leaf, norm in norms.items() if leaf not in unmoved}
        owners = {parts.owner(leaf, stage.train) for leaf in moved}
        idle = [
            part
            for part, norm in _by_owner(stage, moved).items()
            if part in owners and not norm and part not in FOR_ENCODERS
        ]
        if name in ("balance", "expert_balance"):  # it is of routers, and what lies above the last one can't feel it
            if any(moved.values()) or "language.router" in leaves or name == "expert_balance":
                continue
            text = "balance moves nothing that this stage trains: its routers are frozen, and so is all below them"
            fix = f"add 'language.router' to stages.{stage.name}.train, or set loss.balance to 0"
            yield Finding("terms.gradient", "warning", text, fix, stage.name)
        elif idle and name != "encoder":  # which is of vision alone
            text = f"{name} gives {' and '.join(idle)} no gradient; only other terms move it"
            fix = f"leave it if that is meant, or set loss.{name} to 0"
            yield Finding("terms.gradient", "warning", text, fix, stage.name)


def same_weights(student: VLM, teacher: VLM) -> bool:
    """Whether every weight is the same; stops at the first that is not."""
    ours, theirs = named(student.model), named(teacher.model)
    if ours.keys() != theirs.keys() or any(parameter.is_meta for parameter in theirs.values()):
        return False  # or cannot be told: a cached teacher is without weights
    return all(
        parameter is theirs[name]
        or (
            parameter.shape == theirs[name].shape
            and torch.equal(parameter.detach(), theirs[name].detach().to(parameter))
        )
        for name, parameter in ours.items()
    )
