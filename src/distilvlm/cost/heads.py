"""Seconds of the loss head: the terms and their gradients, from the hidden states of a micro-batch's rows.

Where all rows would take too long, two numbers of them are timed: what lies beyond grows in a straight line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from distilvlm.losses.relation import shares_logits
from distilvlm.models import forward, parts

from .clock import Clock
from .memory import Situation
from .scale import filled, trained
from .step import Step, cut_rows

FEWEST_ROWS = 192
"""Rows of the loss head that are timed at least: fewer do not fill its chunks."""


def whole(step: Step, s: Situation, clock: Clock, budget: float, notes: list[str]) -> float:
    """The objective on hidden states of the rows, with as many of them as the budget allows."""
    model = step.student.model
    members = {p for part in trained(model, s.trains).values() for p in part.values()}
    parts.freeze(model)
    head = forward.head_weight(model)
    head.requires_grad_(head in members)
    width = head.shape[1]
    other = 0 if step.teacher is None else forward.head_weight(step.teacher.model).shape[1]
    grams = step.grams()

    def pass_of(share: float) -> Callable[[], object]:
        part, hidden = _part(step, share)
        hidden.requires_grad_()
        if part.batch.roles is not None:
            # An answer that is far from its reference has no slope, and its rows cost nothing.
            with torch.no_grad(), part.cast():
                part.batch = replace(part.batch, reference=part.log_probabilities(hidden, head))
        shape = (part.rows.numel(), other)
        targets = filled(step.device)(torch.empty(shape, dtype=s.teacher_dtype, device="meta")) if other else None

        def run() -> None:
            head.grad = hidden.grad = None
            with part.cast():
                loss = part.loss(hidden, head, targets, grams)
            loss.backward()

        return run

    products = width * (3 if head.requires_grad else 2) + other
    if s.objective.preference:  # log-probabilities come before the slopes that their rows are weighted with
        products += width
    # The relation of many rows goes through a Gram matrix, which costs the same however many there are.
    related = step.batch.visual_rows.numel() if s.objective.relation and head.requires_grad else 0
    probe = head.new_empty(0, width, dtype=s.autocast or head.dtype)
    through_gram = related > 0 and not shares_logits(related, probe)
    needed = 5 * width // 2 if through_gram and probe.element_size() == 2 else width * 11 // 16 if through_gram else 0
    return _along_rows(step, pass_of, products, clock, budget, notes, needed)


def scored(step: Step, clock: Clock, budget: float, notes: list[str]) -> float:
    """Log-probabilities of a micro-batch's answers, from the hidden states of their rows."""
    head = forward.head_weight(step.student.model)

    def pass_of(share: float) -> Callable[[], object]:
        part, hidden = _part(step, share)

        def run() -> None:
            with torch.no_grad(), part.cast():
                part.log_probabilities(hidden, head)

        return run

    return _along_rows(step, pass_of, head.shape[1], clock, budget, notes)


def _part(step: Step, share: float) -> tuple[Step, Tensor]:
    """The step with a share of its rows, and hidden states for them."""
    part = step if share == 1 else replace(step, batch=cut_rows(step.batch, share))
    head = forward.head_weight(step.student.model)
    shape, dtype = (part.rows.numel(), head.shape[1]), step.autocast or head.dtype
    return part, filled(step.device)(torch.empty(shape, dtype=dtype, device="meta"))


def _along_rows(
    step: Step,
    pass_of: Callable[[float], Callable[[], object]],
    products: int,
    clock: Clock,
    budget: float,
    notes: list[str],
    needed: int = 0,
) -> float:
    """Seconds of a pass over all rows of the head, of which as many are timed as the budget allows.

    Args:
        pass_of: share of the rows -> what is timed.
        products: multiplications per row and entry of the vocabulary.
        needed: rows from which on a pass that costs something whatever their number is in proportion to it; 0: none.
    """
    head, rows = forward.head_weight(step.student.model), step.rows.numel()
    guess = 2 * head.shape[0] * rows * products / clock.flops(step.autocast or head.dtype)
    if guess < budget or rows <= FEWEST_ROWS:
        return clock.time(pass_of(1), budget)
    share = min(1.0, max(budget / 3 / guess, FEWEST_ROWS / rows, needed / rows))
    notes.append(f"loss head: {round(share * rows)} of {rows} rows")
    if needed:
        return clock.time(pass_of(share), 0) / share
    clock.time(pass_of(share / 4), 0)  # warms up
    less, more = clock.time(pass_of(share / 2), 0), clock.time(pass_of(share), 0)
    return more + max(0.0, more - less) / (share / 2) * (1 - share)
