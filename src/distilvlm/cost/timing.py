"""Seconds of an update on this device: pieces of the stage's own code, timed on scale models with real tensors.

Blocks are timed at two depths and the loss head at two numbers of rows where the whole would take too long; what lies
beyond grows in a straight line. Nothing is loaded, so a published model is timed on any machine that holds two of its
layers and its vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distilvlm.losses.relation import shares_logits
from distilvlm.models import forward
from distilvlm.models.vlm import VLM
from distilvlm.recipe.schema import OptimSpec
from distilvlm.train.optim import adamw

from .memory import Situation
from .scale import depth, filled, scale_model, train_only, trained
from .step import Step, cut_rows

FEWEST_ROWS = 192
"""Rows of the loss head that are timed at least: fewer do not fill its chunks."""

ENOUGH = 0.4
"""Seconds after which a piece is not timed again."""

WHOLE = 4
"""A language model of at most so many blocks is timed whole, where a line through two depths would be mostly noise."""


@dataclass(frozen=True)
class Seconds:
    """Of a typical micro-batch, and of what an update does once."""

    vision: float
    teacher: float
    student: float  # forward and backward to the hidden states
    head: float  # loss terms and their gradients
    optimiser: float  # once per update
    positions: int  # of the micro-batch, with padding
    rows: int
    measured: str  # what was timed and what is extrapolated

    def update(self, micro_batches: Sequence[tuple[int, int]]) -> float:
        """An update of other micro-batches, [(positions, rows)]: blocks go with positions, the head with rows."""
        bodies = self.vision + self.teacher + self.student
        return self.optimiser + sum(
            bodies * positions / self.positions + self.head * rows / max(1, self.rows)
            for positions, rows in micro_batches
        )


class Clock:
    """Times functions on a device within a budget of seconds."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.left = device, budget
        self._flops: dict[torch.dtype, float] = {}

    def flops(self, dtype: torch.dtype) -> float:
        """About how many floating-point operations a second matrix products make."""
        if dtype not in self._flops:
            size = 768
            matrix = filled(self.device)(torch.empty(size, size, dtype=dtype, device="meta"))
            self._flops[dtype] = 2 * size**3 / self.time(lambda: matrix @ matrix, 0.03)
        return self._flops[dtype]

    def time(self, call: Callable[[], object], limit: float) -> float:
        """Median seconds of a call, after one that warms up; a call that takes longer than `limit` is made once."""
        began = time.perf_counter()
        taken = [self._once(call)]
        if taken[0] < limit:
            taken = [self._once(call)]
            while time.perf_counter() - began < min(limit, ENOUGH) and len(taken) < 7:
                taken.append(self._once(call))
        self.left -= time.perf_counter() - began
        return statistics.median(taken)

    def _once(self, call: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def seconds(s: Situation, spec: OptimSpec, clock: Clock, budget: float) -> Seconds:
    """Time the pieces of a stage.

    Args:
        s: with the stage's typical micro-batch.
        budget: seconds that this should take in all; long pieces are cut until they fit.
    """
    make, device, notes = filled(clock.device), clock.device, list[str]()
    layers, blocks = depth(s.student)
    batch = s.batch.to(device)
    if batch.features is not None:
        batch = replace(batch, features=make(batch.features))
    positions = batch.samples * batch.length
    student = scale_model(s.student, 1, 1, make)
    guide = None if s.teacher is None else scale_model(s.teacher, 1, 1, make, s.teacher_dtype)
    step = Step(student, guide, s.objective, batch, s.autocast, device)
    rows = step.rows.numel()

    head = _head(step, s, clock, budget / 3, notes)
    vision = 0.0
    if s.computes_vision and batch.features is not None:
        size = s.student.layout.size
        pictures = torch.zeros(batch.features.shape[0], 3, size, size, dtype=torch.uint8, device=device)
        vision = _along(
            blocks,
            lambda n: _vision(scale_model(s.student, 1, n, make), s, pictures),
            clock,
            budget / 6,
            notes,
            "vision",
        )
    teacher = 0.0
    if s.teacher is not None and guide is not None:
        original, dtype = s.teacher, s.teacher_dtype

        def targets(n: int) -> Callable[[], object]:
            return Step(
                student, scale_model(original, n, 1, make, dtype), s.objective, batch, s.autocast, device
            ).targets

        teacher = _along(depth(original)[0], targets, clock, budget / 6, notes, "teacher")

    optimised: dict[int, float] = {}

    def body(n: int) -> Callable[[], object]:
        model = scale_model(s.student, n, 1, make)
        members = trained(model.model, s.trains)
        train_only(model.model, members)
        model.model.train()
        if s.checkpointing:
            forward.enable_gradient_checkpointing(model.model)
        run = _body(Step(model, None, s.objective, batch, s.autocast, device))
        run()
        optimised[n] = clock.time(_optimiser(members, spec), budget / 12)
        return run

    whole = _along(layers, body, clock, budget / 3, notes, "student")
    depths = sorted(optimised)
    slope = 0.0 if len(depths) == 1 else (optimised[depths[1]] - optimised[depths[0]]) / (depths[1] - depths[0])
    optimiser = optimised[depths[0]] + max(0.0, slope) * (layers - depths[0])
    return Seconds(vision, teacher, whole, head, optimiser, positions, rows, "; ".join(notes) or "measured whole")


def _along(
    depth: int, prepare: Callable[[int], Callable[[], object]], clock: Clock, budget: float, notes: list[str], what: str
) -> float:
    """Seconds at `depth` blocks: measured, or along the line through one and two blocks."""
    if depth <= WHOLE:
        return clock.time(prepare(depth), budget)
    one, two = clock.time(prepare(1), budget / 2), clock.time(prepare(2), budget / 2)
    notes.append(f"{what}: 2 of {depth} blocks")
    return one + max(0.0, two - one) * (depth - 1)


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
        for parameter in step.student.model.parameters():
            parameter.grad = None
        with step.cast():
            hidden = step.hidden()
        if hidden.requires_grad:
            hidden.backward(torch.ones_like(hidden))

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


def _head(step: Step, s: Situation, clock: Clock, budget: float, notes: list[str]) -> float:
    """The objective on hidden states of the rows, with as many of them as the budget allows."""
    model = step.student.model
    members = {p for part in trained(model, s.trains).values() for p in part.values()}
    model.requires_grad_(False)
    head = forward.head_weight(model)
    head.requires_grad_(head in members)
    width, vocabulary = head.shape[1], head.shape[0]
    other = 0 if step.teacher is None else forward.head_weight(step.teacher.model).shape[1]
    grams = step.grams()

    def pass_of(share: float) -> Callable[[], object]:
        part = step if share == 1 else replace(step, batch=cut_rows(step.batch, share))
        rows = part.rows.numel()
        make = filled(step.device)
        dtype = head.dtype if s.autocast is None else s.autocast
        hidden = make(torch.empty(rows, width, dtype=dtype, device="meta")).requires_grad_()
        targets = make(torch.empty(rows, other, dtype=s.teacher_dtype, device="meta")) if other else None

        def run() -> None:
            head.grad = hidden.grad = None
            with part.cast():
                loss = part.loss(hidden, head, targets, grams)
            loss.backward()

        return run

    rows = step.rows.numel()
    products = width * (3 if head.requires_grad else 2) + other
    guess = 2 * vocabulary * rows * products / clock.flops(s.autocast or head.dtype)
    if guess < budget or rows <= FEWEST_ROWS:
        return clock.time(pass_of(1), budget)
    # The relation of many rows goes through a Gram matrix, which costs the same however many there are.
    related = step.batch.visual_rows.numel() if s.objective.relation and head.requires_grad else 0
    probe = head.new_empty(0, width, dtype=s.autocast or head.dtype)
    through_gram = related > 0 and not shares_logits(related, probe)
    needed = 5 * width // 2 if through_gram and probe.element_size() == 2 else width * 11 // 16 if through_gram else 0
    share = min(1.0, max(budget / 3 / guess, FEWEST_ROWS / rows, needed / rows))
    notes.append(f"loss head: {round(share * rows)} of {rows} rows")
    if through_gram:
        return clock.time(pass_of(share), 0) / share
    clock.time(pass_of(share / 4), 0)  # warms up
    less, more = clock.time(pass_of(share / 2), 0), clock.time(pass_of(share), 0)
    return more + max(0.0, more - less) / (share / 2) * (1 - share)
