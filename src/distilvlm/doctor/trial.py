"""A stage's task tried on a few samples: what its terms give, and which parts they reach. Nothing is trained.

The student is compared with the teacher, with itself, and with itself while it is a little off. All three go the way
that training goes: `Task`, `Objective` and the fused head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from distilvlm.data import Batch, DataError, Sample, StageData
from distilvlm.data.collate import collate
from distilvlm.losses.answers import Answers, Preferences
from distilvlm.losses.objective import Objective
from distilvlm.models import forward
from distilvlm.models.alone import Encoder
from distilvlm.models.parts import Parameters, freeze
from distilvlm.models.vlm import VLM
from distilvlm.recipe.schema import TERMS
from distilvlm.teachers import Targets, Teacher
from distilvlm.train import Task

from .template import spread

SAMPLES = ((True, 2), (False, 1))
"""With pictures? -> samples that are tried."""

CANDIDATES = 64
"""Samples of either kind of which the shortest are tried."""

OFF = 0.3
"""How far the perturbed student's weights are off, as a share of their root mean square."""


@dataclass(frozen=True)
class Distance:
    """How far a student's answers are from their reference, for a preference loss."""

    scaled: float  # β · |log-ratio|, mean over answers
    slope: float  # of the loss at the answers, as a share of its slope where student and reference are equal
    equal: float  # the loss where they are equal


@dataclass(frozen=True)
class TermTrial:
    """One term on the batch. `gradients` are norms per leaf part, for the student that is a little off."""

    rows: int
    value: float  # against the teacher, or the targets
    itself: float  # the student as its own teacher
    perturbed: float  # the student a little off, against itself as it is
    gradients: Mapping[str, float]
    distance: Distance | None = None  # of preferences


def samples_of(data: StageData) -> list[Sample]:
    """A few short samples, with and without pictures, as far as there are such."""
    return list(tried(data).values())


def tried(data: StageData) -> dict[int, Sample]:
    """Place in the data -> sample, of `samples_of`."""
    counts, lengths = data.picture_counts, data.lengths
    chosen: dict[int, Sample] = {}
    for pictures, wanted in SAMPLES:
        candidates = spread(np.flatnonzero((counts > 0) == pictures), CANDIDATES)
        usable = 0
        for index in sorted(candidates, key=lambda place: (lengths[place], place)):
            if usable == wanted:
                break
            with contextlib.suppress(DataError):  # what can't be used is reported by name elsewhere
                sample = data[0, index]
                if sample.weight:
                    chosen[int(index)] = sample
                    usable += 1
    return chosen


def try_terms(
    student: VLM,
    teacher: Teacher | None,
    objective: Objective,
    parts: Mapping[str, Parameters],
    samples: list[Sample],
) -> dict[str, TermTrial]:
    """Every enabled term that has rows, on `samples`. To be called within `untouched`.

    Args:
        teacher: where it is None, the teacher's terms are tried against the student itself only.
        parts: leaf part -> parameters that train.
    """
    return _Trial(student, teacher, objective, parts, collate(samples)).terms()


class _Trial:
    def __init__(
        self,
        student: VLM,
        teacher: Teacher | None,
        objective: Objective,
        parts: Mapping[str, Parameters],
        batch: Batch,
    ) -> None:
        self.student, self.teacher, self.objective, self.parts = student, teacher, objective, parts
        freeze(student.model)
        for members in parts.values():
            for parameter in members.values():
                parameter.requires_grad_(True)
        student.train(False)
        self.device = forward.head_weight(student.model).device
        self.batch = batch.to(self.device)
        self.samples = batch.samples // 2 if objective.preference else batch.samples
        self.rows = objective.rows(self.batch.response_rows, self.batch.visual_rows)
        self.features = self._features()

    def terms(self) -> dict[str, TermTrial]:
        enabled = [name for name in TERMS if getattr(self.objective, name)]
        rows = {name: self._count(name) for name in enabled}
        alike = self._itself()
        targets = alike if self.teacher is None else self._targets(self.teacher)
        values = self._values(targets)
        itself = self._values(alike)
        with perturbed(self.parts):
            off = self._values(alike)
            # Which parts preferences reach is asked where their loss is not flat: near the student as it is.
            against = {name: alike if name == "preference" else targets for name in enabled}
            gradients = {name: self._gradients(name, against[name]) for name in enabled if rows[name]}
        distance = self._distance(alike, targets) if self.objective.preference else None
        return {
            name: TermTrial(
                rows[name],
                values[name],
                itself[name],
                off[name],
                gradients.get(name, {}),
                distance if name == "preference" else None,
            )
            for name in enabled
        }

    def _count(self, name: str) -> int:
        if name == "balance":
            return int(self.batch.attention_mask.sum())
        return (self.batch.visual_rows if name in ("visual", "relation") else self.batch.response_rows).numel()

    def _features(self) -> Tensor | None:
        batch = self.batch
        if batch.features is not None or batch.pictures is None:
            return batch.features
        if any(leaf.partition(".")[0] == "vision" for leaf in self.parts):
            return None  # the task computes them, with a graph
        with torch.no_grad():
            return forward.vision_features(self.student.model, self.student.layout, batch.pictures)

    def _itself(self) -> Targets:
        """The student as its own teacher, as it is now."""
        model, layout, features = self.student.model, self.student.layout, self.features
        with torch.no_grad():
            if features is None and self.batch.pictures is not None:
                features = forward.vision_features(model, layout, self.batch.pictures)
            hidden = forward.hidden_states(model, layout, self.batch, features)  # [samples, length, d]
            # A copy: a head that trains is about to be perturbed.
            return Targets(hidden.flatten(0, 1)[self.rows], forward.head_weight(model).detach().clone())

    def _targets(self, teacher: Teacher) -> Targets:
        shared = self.features if teacher.shares_vision else None
        return teacher.targets(self.batch, self.rows, shared)

    def _answers(self, targets: Targets) -> Tensor:
        """[samples] log-probability of each answer."""
        batch = self.batch
        assert targets.hidden is not None and targets.head is not None  # else the schema refuses preferences
        owners = batch.owners_of(self.rows)
        answers = Answers.of(
            targets.hidden, targets.head, self.rows, owners, batch.response_rows, batch.response_targets
        )
        return answers.log_probabilities(batch.samples)

    def _referred(self, targets: Targets) -> Batch:
        """The batch with what the targets' model says of its preferences."""
        return replace(self.batch, reference=self._answers(targets)) if self.objective.preference else self.batch

    def _values(self, targets: Targets) -> dict[str, float]:
        task = Task(self.student, self.objective, targets.head, teacher_ids=targets.ids).eval()
        with torch.no_grad():
            terms = task(self._referred(targets), self.features, targets, self.rows, self.samples)["terms"]
        return {name: float(value) for name, value in terms.items()}

    def _distance(self, student: Targets, reference: Targets) -> Distance:
        roles, weights, loss = self.batch.roles, self.batch.weights.double(), self.objective.preferred
        assert roles is not None
        ours, theirs = self._answers(student), self._answers(reference)

        def at(logps: Tensor) -> tuple[float, float]:
            logps = logps.clone().requires_grad_()
            value, _ = loss(logps, Preferences(roles, theirs), weights)
            (slope,) = torch.autograd.grad(value, logps)
            return float(value.detach()) / self.samples, float(slope.abs().sum())

        (_, here), (equal, steepest) = at(ours), at(theirs)
        far = (self.objective.beta * (ours - theirs).abs())[roles != 0].mean()
        return Distance(float(far), here / steepest if steepest else 1.0, equal)

    def _gradients(self, name: str, targets: Targets) -> dict[str, float]:
        """Norm of the gradient that one term alone gives each leaf part."""
        alone = replace(self.objective, **{other: 0.0 for other in TERMS if other != name})
        rows = alone.rows(self.batch.response_rows, self.batch.visual_rows)
        given = targets
        if targets.hidden is not None and targets.responses is None:  # else they are of visual rows alone
            given = replace(targets, hidden=targets.hidden[torch.searchsorted(self.rows, rows)])
        task = Task(self.student, alone, given.head, teacher_ids=given.ids).eval()
        loss: Tensor = task(self._referred(targets), self.features, given, rows, self.samples)["loss"]
        return norms(self.student.trees, self.parts, loss)


def norms(trees: Iterable[nn.Module], parts: Mapping[str, Parameters], loss: Tensor) -> dict[str, float]:
    """Norm of a loss's gradient in each leaf part; nothing is left with gradients."""
    _clear(trees)
    if loss.requires_grad:
        loss.backward()
    found = {
        leaf: float(torch.stack([_squares(parameter) for parameter in members.values()]).sum().sqrt())
        for leaf, members in parts.items()
    }
    _clear(trees)
    return found


def _clear(trees: Iterable[nn.Module]) -> None:
    for tree in trees:
        tree.zero_grad(set_to_none=True)


def _squares(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return torch.zeros((), device=parameter.device) if gradient is None else gradient.float().square().sum()


@contextlib.contextmanager
def perturbed(parts: Mapping[str, Parameters]) -> Iterator[None]:
    """Inside, one matrix of every leaf part is off by noise of a generator of our own; outside, it has its own bits.

    So is one stack of experts: they are equal when they are new, and as long as they are, no router makes a difference.
    """
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for members in parts.values():
                first = next((p for p in members.values() if p.ndim >= 2), next(iter(members.values())))
                experts = next((p for name, p in members.items() if ".experts." in name), first)
                for parameter in dict.fromkeys((first, experts)):
                    kept.append((parameter, parameter.detach().clone()))
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                    scale = parameter.float().square().mean().sqrt()
                    parameter.add_(noise * (OFF * (scale if scale > 0 else 1.0)))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)


@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """What trains, gradients, modes and random states are, behind it, what they were before: a run's bits depend on
    them."""
    parameters = [(p, p.requires_grad, p.grad) for model in models for p in model.parameters()]
    modes = [(module, module.training) for model in models for module in model.modules()]
    devices = sorted({p.device.index for p, _, _ in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter, _, _ in parameters:
                parameter.grad = None
            yield
        finally:
            for parameter, trains, gradient in parameters:
                parameter.requires_grad_(trains)
                parameter.grad = gradient
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def as_found(student: VLM | Encoder) -> Iterator[None]:
    """Behind it, the student has the adaptors that it had before, and the same one is active."""
    before, workflow = student.adaptors, None if student.host is None else student.host.active
    try:
        yield
    finally:
        host = student.host
        if host is not None and workflow is None:
            host.detach()
        elif host is not None and workflow is not None:
            host.set(workflow)
            for name in student.adaptors[len(before) :]:
                host.remove(name)
