"""A stage that learns from pictures alone: its language model, if there is one, does not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from distilvlm.data import Order, StageData
from distilvlm.data.stage import stage_order
from distilvlm.models.alone import Encoder
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.teachers.encoders import Shape

from . import encoders
from .clock import Clock
from .encoders import Teaching
from .memory import count
from .scale import train_only, trained
from .sharing import Sharing


@dataclass(frozen=True)
class PictureStage:
    """Stage `index` as `student` trains it."""

    recipe: Recipe
    index: int
    student: VLM | Encoder
    shapes: Mapping[str, Shape]
    device: torch.device
    world: int
    base: int  # bytes of the process without models
    slack: float  # what an allocator takes per byte of tensors

    def numbers(self, data: StageData | None) -> tuple[int | None, int | None]:
        """Pictures and updates of the stage."""
        stage = self.recipe.stages[self.index]
        if data is not None:
            order = stage_order(self.recipe, self.index, data)
            return len(data), order.total_updates(stage.optim.epochs, stage.optim.updates)
        rows = [self.recipe.data[name].rows for name in stage.data]
        pictures = None if None in rows else sum(row for row in rows if row is not None)
        updates = stage.optim.updates
        if updates is None and pictures is not None:
            updates = Order(pictures, stage.optim.batch, 0, "").total_updates(stage.optim.epochs)
        return pictures, updates

    def measured(
        self, data: StageData | None, clock: Clock | None
    ) -> tuple[dict[str, int], dict[str, float], Teaching]:
        """Bytes and seconds by what they are for, and what encoders cost; no seconds without a clock."""
        recipe, stage = self.recipe, self.recipe.stages[self.index]
        student = self.student.without_weights()  # what trains is chosen here
        members = trained(student.model, stage.train)
        train_only(student.model, members)
        own = -(-stage.optim.batch // self.world)
        together = min(recipe.machine.micro_batch, own)
        taught = encoders.teaching(recipe, stage, student, self.shapes, together)
        vision = any(name.startswith("model.vision_tower.") for part in members.values() for name in part)
        working, operations = encoders.seeing(student, together, vision, recipe.machine.gradient_checkpointing)
        sharing = Sharing(student, members, recipe.machine, self.world, self.device)
        if sharing.split:  # no layer of a language model has any: all are whole until they are added up
            working += 4 * count(members)
        working = max(working + taught.compared, taught.looking)
        beside = sharing.beside(working, runs=False)
        size = self.student.layout.size
        larger = max((shape.size for shape in self.shapes.values()), default=0) if recipe.cache is None else 0
        memory = {
            "process": self.base if self.device.type == "cpu" else 0,
            "student": sum(sharing.trees),
            "encoders": taught.held,
            "gradients": sharing.gradients,
            "optimiser": 2 * sharing.gradients,
            **beside,
            "working": working,
            "data": 3 * own * (size**2 + (larger**2 if larger > size else 0)),
        }
        if self.device.type == "cpu":
            pictures, updates = self.numbers(data)
            shown = 0 if pictures is None else min(pictures, (updates or 0) * stage.optim.batch)
            memory["data"] += taught.mapped(shown, pictures or 0)
            tensors = 3 * sharing.gradients + sum(beside.values()) + working
            memory["allocator"] = round(tensors * (self.slack - 1))
        if clock is None:
            return memory, {}, taught
        speed = clock.flops(torch.bfloat16 if recipe.machine.precision == "bf16" else torch.float32)
        paths = [] if data is None else list(data.record(0).images)
        time = {
            "encoders": own * taught.operations / clock.flops(torch.float32),
            "student": own * operations / speed,
            "data": own * encoders.reading(recipe, paths, self.student, clock),
        }
        return memory, time, taught
