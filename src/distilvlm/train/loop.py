"""One loop for every stage: micro-batches in, one optimiser update out, nothing written.

Loss of an update = sum of per-sample losses / samples of the whole update over all processes and micro-batches. Every
process knows that number from the order of samples, so neither micro-batch size, accumulation nor the number of
processes changes the objective.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from distilvlm.data.batch import CHOSEN, REJECTED, Batch
from distilvlm.data.grouping import Grouping
from distilvlm.losses.objective import Objective
from distilvlm.models import forward, routing
from distilvlm.models.encoders import Seen
from distilvlm.recipe.faults import Explosion
from distilvlm.recipe.schedules import Ramp
from distilvlm.recipe.schema import OptimSpec
from distilvlm.teachers import Targets, Teacher

from .now import Now
from .optim import set_rates
from .parallel import Parallel, Replicated
from .task import Agree, Task, objective_at
from .unsound import ExplodingError, require_finite
from .watch import Watch

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Update:
    """What one optimiser update did. `terms` are means over its samples, each without its weight."""

    number: int  # 1-based: how many updates the stage has made
    loss: float
    terms: dict[str, float]
    rate: float  # learning rate of the first group
    gradient_norm: float
    samples: int
    seconds: float
    wait: float = 0.0  # seconds of these in which this process had no micro-batch to work on
    scheduled: dict[str, float] = field(default_factory=dict)  # weights and temperature, of those that change
    routing: list[routing.LayerUse] = field(default_factory=list)  # of a sparse student, layer by layer
    vision_routing: list[routing.LayerUse] = field(default_factory=list)  # of a tower with experts, layer by layer


class Loop:
    """Trains one stage.

    Args:
        accelerator: devices, processes and mixed precision.
        task: the student with the stage's objective.
        optimizer: over the task's trainable parameters.
        teacher: None for a stage of text loss only; not asked at updates where no term compares with it.
        see: a batch, on the device, to what encoders see in its pictures; for a stage that compares with them.
        spec: rates and schedule.
        updates: updates of the whole stage (the schedule's length).
        grouping: how micro-batches are made.
        schedule: weights of the task's objective that change, and its temperature.
        parallel: how processes share it; default: each holds the whole task.
        asked_to_stop: whether this process was; after an update `stopping` says whether any was, to all alike.
        explosion: when an update counts as exploding, and what is done then.

    `now` says where it is.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        optimizer: torch.optim.Optimizer,
        teacher: Teacher | None,
        spec: OptimSpec,
        updates: int,
        grouping: Grouping,
        see: Callable[[Batch], Mapping[str, Seen]] | None = None,
        schedule: Mapping[str, Ramp] | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
        parallel: Parallel | None = None,
        explosion: Explosion | None = None,
    ) -> None:
        self.accelerator, self.task, self.teacher, self.see = accelerator, task, teacher, see
        self.spec, self.updates, self.grouping = spec, updates, grouping
        self.schedule, self._whole = schedule or {}, task.objective
        self.asked_to_stop, self.stopping = asked_to_stop, False
        self.parallel = Replicated(accelerator, task) if parallel is None else parallel
        self.optimizer = optimizer
        self.explosion = explosion or Explosion()
        self.now, self._watch = Now(accelerator.device), Watch(self.explosion)

    def run(self, updates: Iterable[tuple[int, int, Collection[Batch]]]) -> Iterator[Update]:
        """Make an update for each `(update number from 0, samples in it, micro-batches of this process)`; these are
        asked for one by one.

        Raises:
            NonFiniteError, ExplodingError: before anything is changed by the update concerned, on every process.
            FrozenBaseError: at the first update; likewise.
        """
        self.task.train()
        first = True
        started, waiting = time.perf_counter(), _Waiting(self.now)
        for number, samples, micro_batches in waiting.on(updates):
            self.now.begin(number + 1)
            rate = self.spec.lr * set_rates(self.optimizer, self.spec, number, self.updates)
            self.task.objective = objective_at(self._whole, self.schedule, number, self.updates)
            now_at = {name: getattr(self.task.objective, name) for name in self.schedule}
            self.parallel.clear(self.optimizer)
            sums: dict[str, float] = {}
            tallies: dict[str, Tensor] = {}
            joined = self.parallel.micro_batches(micro_batches, idle_batch(self.task.objective))
            if self._looks_ahead(samples):
                joined = list(waiting.on(joined))
            agree = self._agreement(joined, samples)
            for index, batch in enumerate(waiting.on(joined)):
                self.now.work(index + 1, batch)
                last = index == len(joined) - 1
                with contextlib.nullcontext() if last else self.parallel.gathering():
                    values, tally = self._forward_backward(batch, samples, agree)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
                tallies = {name: tallies[name] + new if name in tallies else new for name, new in tally.items()}
            self.now.do("makes the update with the other processes")
            if first:
                self.task.require_frozen_base()
                first = False
            norm = self._clip()
            totals = self._over_processes(sums)
            self._require_sound(number + 1, totals, rate, norm)
            self.parallel.step(self.optimizer)
            use = {name: routing.used(self._summed(tally), self.task.top_k[name]) for name, tally in tallies.items()}
            now = time.perf_counter()
            loss = totals.pop("loss")
            spent, waited = now - started, waiting.taken()
            self.now.do("has made it")
            yield Update(number + 1, loss, totals, rate, norm, samples, spent, waited, now_at, **use)
            started = time.perf_counter()

    def _looks_ahead(self, samples: int) -> bool:
        """Whether a loss depends on the whole update, and a process may have more than one micro-batch of it: as far as
        every process knows, since what follows are collective calls."""
        alone = self.grouping.tokens is None and samples <= self.grouping.samples * self.accelerator.num_processes
        return self.task.objective.agrees and not alone

    def _agreement(self, micro_batches: Collection[Batch], samples: int) -> Agree:
        """How a loss that depends on the whole update (KTO's z0) learns of the other micro-batches.

        Where no process has more than one, they speak up within their forward. Otherwise all micro-batches run once
        more, without gradient, so that the objective is the same whatever their size; what is random is drawn anew.
        """
        if not self._looks_ahead(samples):
            return self._summed
        sums = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        for batch in micro_batches:
            batch, rows, features = self._at_hand(batch)
            with self.accelerator.autocast():
                sums += self.task.moves(batch, features, rows)  # without gradient, so not through what is wrapped
        sums = self._summed(sums)
        return lambda _: sums

    def _at_hand(self, batch: Batch) -> tuple[Batch, Tensor, Tensor | None]:
        """The batch on the device, the rows that the terms need, and its features where the tower is frozen."""
        batch = batch.to(self.accelerator.device)
        rows = self.task.objective.rows(batch.response_rows, batch.visual_rows)
        features = batch.features
        if features is None and batch.pictures is not None and not self.task.vision_trains:
            with torch.no_grad(), self.accelerator.autocast():
                features = forward.vision_features(self.task.student, self.task.layout, batch.pictures)
        return batch, rows, features

    def given(self, batch: Batch) -> tuple[Batch, Tensor | None, Targets | None, Tensor, Mapping[str, Seen] | None]:
        """The batch on the device, features of a frozen tower, the teacher's targets, the rows that the terms need, and
        what encoders saw."""
        batch, rows, features = self._at_hand(batch)
        targets = None
        if self.teacher is not None and self.task.objective.compares:
            shared = features if self.teacher.shares_vision else None
            with self.accelerator.autocast():
                targets = self.teacher.targets(batch, rows, shared)
        return batch, features, targets, rows, None if self.see is None else self.see(batch)

    def _forward_backward(self, batch: Batch, samples: int, agree: Agree) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Add one micro-batch's gradient; returns its loss and terms, divided by the update's samples, and how its
        tokens were routed."""
        batch, features, targets, rows, seen = self.given(batch)
        result = self.parallel.forward(batch, features, targets, rows, samples, agree, seen)
        values = {"loss": result["loss"].detach(), **result["terms"]}
        values = dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True))
        # Gradients are averaged over processes; our loss is already divided by the samples of all of them.
        scale = float(self.accelerator.num_processes)
        if not all(map(math.isfinite, values.values())):
            # Others would wait for ever for a process that stopped here. NaN reaches them all where gradients meet,
            # also from a loss whose own gradient is finite.
            scale = math.nan
            self.now.suspect = self.now.suspect or self.now.batch
        self.parallel.backward(result["loss"] * scale)
        return values, {name: result[name] for name in self.task.top_k if result[name] is not None}

    def _clip(self) -> float:
        """The gradient's norm before it was cut."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        return self.parallel.clip(trained, self.spec.clip if self.spec.clip is not None else math.inf)

    def _require_sound(self, update: int, totals: Mapping[str, float], rate: float, norm: float) -> None:
        """Raises NonFiniteError and ExplodingError: all is known to every process alike."""
        require_finite(update, totals, rate, norm)
        exploding = self._watch.see(totals["loss"], norm)
        if exploding is not None and self.explosion.then == "stop":
            raise ExplodingError(exploding, update, totals, rate, norm)
        if exploding is not None and self.accelerator.is_main_process:
            logger.warning("update %d: this stage may be exploding: %s", update, exploding)

    def _over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        asked = self.asked_to_stop()
        if self.accelerator.num_processes == 1:
            self.stopping = asked
            return dict(sums)
        names = sorted(sums)  # the same on every process, whatever its batches began with
        own = [float(asked), *(sums[name] for name in names)]
        together = self._summed(torch.tensor(own, dtype=torch.float64, device=self.accelerator.device))
        stopping, *values = together.tolist()
        self.stopping = stopping > 0
        totals = dict(zip(names, values, strict=True))
        return {name: totals[name] for name in sums}  # told in the order in which one process tells them

    def _summed(self, local: Tensor) -> Tensor:
        """The sum over processes."""
        if self.accelerator.num_processes == 1:
            return local
        return self.accelerator.reduce(local, reduction="sum")  # type: ignore[return-value]


class _Waiting:
    """How long a loop waits for what it iterates over."""

    def __init__(self, now: Now) -> None:
        self._seconds, self._now = 0.0, now

    def on(self, made: Iterable[T]) -> Iterator[T]:
        items = iter(made)
        while True:
            asked = time.perf_counter()
            self._now.do("waits for data")
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._seconds += time.perf_counter() - asked
            yield item

    def taken(self) -> float:
        """The seconds since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def idle_batch(objective: Objective) -> Batch:
    """A batch of no weight, for a process that has no sample in an update."""
    none = torch.zeros(0, dtype=torch.int64)
    samples = 2 if objective.preference else 1
    return Batch(
        input_ids=torch.zeros(samples, 2, dtype=torch.int64),
        attention_mask=torch.ones(samples, 2, dtype=torch.int64),  # attention to nothing may be NaN
        placeholder_rows=none,
        visual_rows=none,
        response_rows=none,
        response_targets=none,
        weights=torch.zeros(samples),
        pictures=None,
        features=None,
        keys=(),
        roles=torch.tensor([CHOSEN, REJECTED]) if objective.preference else None,
        reference=torch.zeros(samples, dtype=torch.float64) if objective.preference else None,
    )
