"""Seconds of an update on this device: pieces of the stage's own code, timed on scale models with real tensors.

Blocks are timed at two depths and the loss head at two numbers of rows where the whole would take too long; what lies
beyond grows in a straight line. Nothing is loaded, so a published model is timed on any machine that holds two of its
layers of a kind and its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distilvlm.data import Batch
from distilvlm.models import forward
from distilvlm.models.shards import hash_of
from distilvlm.models.vlm import VLM
from distilvlm.recipe.schema import OptimSpec
from distilvlm.train.optim import adamw

from . import heads
from .clock import Clock
from .memory import Situation
from .scale import Lines, depth, filled, lines, scale_model, train_only, trained
from .shapes import Size
from .step import Step, features_like

WHOLE = 4
"""A stack of at most so many blocks is timed whole, where a line through two depths would be mostly noise."""


@dataclass(frozen=True)
class Seconds:
    """Of a typical micro-batch, and of what an update does once."""

    vision: float
    teacher: float
    student: float  # forward and backward to the hidden states
    head: float  # loss terms and their gradients
    before: float  # where KTO's z0 is of several micro-batches: all that gives log-probabilities, once more
    optimiser: float  # once per update
    positions: int  # of the micro-batch, with padding
    rows: int
    measured: str  # what was timed and what is extrapolated

    def update(self, micro_batches: Sequence[Size]) -> float:
        """An update of other micro-batches: blocks go with positions, the head with rows."""
        bodies = self.vision + self.teacher + self.student + self.before
        return self.optimiser + sum(
            bodies * size.positions / self.positions + self.head * size.rows / max(1, self.rows)
            for size in micro_batches
        )


def seconds(s: Situation, spec: OptimSpec, clock: Clock, budget: float) -> Seconds:
    """Time the pieces of a stage.

    Args:
        s: with the stage's typical micro-batch.
        budget: seconds that this should take in all; long pieces are cut until they fit.
    """
    make, device, notes = filled(clock.device), clock.device, list[str]()
    batch = _on(s.batch, s.student, device)
    positions = batch.input_ids.numel()
    base = cuts(s.student)[0][0]
    student = scale_model(s.student, base, 1, make)
    guide = None if s.teacher is None else scale_model(s.teacher, [0], 1, make, s.teacher_dtype)
    # The balance of experts is no work of the head's, and hardly any at all.
    step = Step(student, guide, replace(s.objective, balance=0.0), batch, s.autocast, device, kept=s.kept)
    rows = step.rows.numel()

    head = heads.whole(step, s, clock, budget / 3, notes)
    vision = _seeing(s, batch, clock, budget / 6, notes)
    teacher = 0.0
    if guide is not None and s.kept is not None:
        teacher = clock.time(_reading(guide, rows, device), budget / 12)
    elif s.teacher is not None:
        teacher = _listening(s.teacher, s, batch, clock, budget / 6, notes)

    optimised: Lines = []

    def body(layers: list[int]) -> Callable[[], object]:
        model = scale_model(s.student, layers, 1, make, choosing=s.choosing)
        members = trained(model.model, s.trains)
        train_only(model.model, members)
        model.train()
        if s.checkpointing:
            forward.enable_gradient_checkpointing(model.model)
        run = _body(Step(model, None, s.objective, batch, s.autocast, device))
        run()
        optimised.append((layers, clock.time(_optimiser(members, spec), budget / 12)))
        return run

    whole = _along(cuts(s.student), body, clock, budget / 3, notes, "student")
    before = 0.0
    if s.objective.agrees and s.accumulates:

        def again(layers: list[int]) -> Callable[[], object]:
            model = scale_model(s.student, layers, 1, make, choosing=s.choosing)
            return _forward(Step(model, None, s.objective, batch, s.autocast, device))

        before = vision + heads.scored(step, clock, budget / 12, notes)
        before += _along(cuts(s.student), again, clock, budget / 12, notes, "student")
    taken = {tuple(layers): seconds for layers, seconds in optimised}
    optimiser = max(taken[tuple(base)], sum(count * taken[tuple(layers)] for layers, count in cuts(s.student)))
    told = "; ".join(dict.fromkeys(notes)) or "measured whole"
    return Seconds(vision, teacher, whole, head, before, optimiser, positions, rows, told)


def looking(s: Situation, teacher: VLM, clock: Clock, budget: float) -> float:
    """Seconds that a teacher takes to give log-probabilities to the answers of a typical micro-batch of preferences, or
    hidden rows to be kept; arguments as `seconds`."""
    batch = _on(s.batch, teacher, clock.device)
    guide = scale_model(teacher, [0], 1, filled(clock.device), s.teacher_dtype)
    vision = _seeing(replace(s, student=teacher, vision_trains=False), batch, clock, budget / 3, [])
    scored = 0.0
    if s.objective.preference:
        scored = heads.scored(Step(guide, None, s.objective, batch, s.autocast, clock.device), clock, budget / 3, [])
    return vision + scored + _listening(teacher, s, batch, clock, budget / 3, [])


def cuts(vlm: VLM) -> Lines:
    """The cuts of a language model that are timed, and how often each counts."""
    layers = depth(vlm)[0]
    return [(list(range(layers)), 1.0)] if layers <= WHOLE else lines(vlm, 1)


def largest_cut(vlm: VLM) -> int:
    """Parameters of the largest scale model that is timed."""
    layers, _ = max(cuts(vlm), key=lambda cut: len(cut[0]))
    return sum(tensor.numel() for tensor in scale_model(vlm, layers, 1, lambda like: like).tensors)


def _on(batch: Batch, vlm: VLM, device: torch.device) -> Batch:
    """The batch with features of the model's own tower."""
    batch = batch.to(device)
    return batch if batch.features is None else replace(batch, features=filled(device)(features_like(batch, vlm)))


def _along(
    cuts: Lines,
    prepare: Callable[[list[int]], Callable[[], object]],
    clock: Clock,
    budget: float,
    notes: list[str],
    what: str,
) -> float:
    """Seconds of the whole stack: measured, or along lines through the cuts."""
    times = [(count, clock.time(prepare(layers), budget / len(cuts))) for layers, count in cuts]
    if len(cuts) == 1:
        return times[0][1]
    shortest = times[0][1]
    total = round(sum(count * len(layers) for layers, count in cuts))
    notes.append(f"{what}: {max(len(layers) for layers, _ in cuts)} of {total} blocks")
    return shortest + sum(count * max(0.0, seconds - shortest) for count, seconds in times[1:])


def _seeing(s: Situation, batch: Batch, clock: Clock, budget: float, notes: list[str]) -> float:
    """Of the student's tower, where it runs in every step."""
    if not s.computes_vision or batch.features is None:
        return 0.0
    size, blocks = s.student.layout.size, depth(s.student)[1]
    pictures = torch.zeros(batch.features.shape[0], 3, size, size, dtype=torch.uint8, device=clock.device)
    first = cuts(s.student)[0][0][:1]

    def prepare(layers: list[int]) -> Callable[[], object]:
        return _vision(scale_model(s.student, first, len(layers), filled(clock.device)), s, pictures)

    stack: Lines = [([0], 2.0 - blocks), ([0, 1], blocks - 1.0)]
    return _along([(list(range(blocks)), 1.0)] if blocks <= WHOLE else stack, prepare, clock, budget, notes, "vision")


def _listening(teacher: VLM, s: Situation, batch: Batch, clock: Clock, budget: float, notes: list[str]) -> float:
    """Of the teacher, to the hidden states that are compared."""
    batch = _on(batch.teacher or batch, teacher, clock.device)

    def prepare(layers: list[int]) -> Callable[[], object]:
        guide = scale_model(teacher, layers, 1, filled(clock.device), s.teacher_dtype)
        return Step(guide, guide, s.objective, batch, s.autocast, clock.device).targets

    return _along(cuts(teacher), prepare, clock, budget, notes, "teacher")


def _reading(teacher: VLM, rows: int, device: torch.device) -> Callable[[], object]:
    """What takes the time of reading kept hidden rows: comparing them with their hash."""
    head = forward.head_weight(teacher.model)
    kept = torch.zeros(rows, head.shape[1], dtype=head.dtype)

    def run() -> None:
        hash_of({"hidden": kept})
        kept.to(device)

    return run


def _vision(model: VLM, s: Situation, pictures: Tensor) -> Callable[[], object]:
    if s.vision_trains:
        model.model.model.vision_tower.requires_grad_(True)
    autocast = torch.autocast(pictures.device.type, s.autocast or torch.bfloat16, enabled=s.autocast is not None)

    def run() -> None:
        with autocast:
            features = forward.vision_features(model.model, model.layout, pictures)
        if features.requires_grad:
            features.backward(torch.ones_like(features))

    return run


def _body(step: Step) -> Callable[[], object]:
    def run() -> None:
        for tree in step.student.trees:
            tree.zero_grad(set_to_none=True)
        with step.cast():
            hidden, _ = step.hidden()
        if hidden.requires_grad:
            hidden.backward(torch.ones_like(hidden))

    return run


def _forward(step: Step) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad(), step.cast():
            step.hidden()

    return run


def _optimiser(members: Mapping[str, Mapping[str, nn.Parameter]], spec: OptimSpec) -> Callable[[], object]:
    parameters = [p for part in members.values() for p in part.values()]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(members, spec)
    optimizer.step()  # makes the moments

    def run() -> None:
        nn.utils.clip_grad_norm_(parameters, spec.clip or 1e9)
        optimizer.step()

    return run
