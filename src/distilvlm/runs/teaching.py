"""The cache of a recipe's teacher (teacher: {kind: cached}), filled before a run begins or by `distilvlm cache`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping

import torch
from accelerate import Accelerator

from distilvlm.cost.numbers import as_bytes, as_seconds
from distilvlm.data import StageData
from distilvlm.data.stage import stage_order
from distilvlm.doctor.trial import tried
from distilvlm.models.shards import read_json
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.teachers import quantised
from distilvlm.teachers.cache import Asked, TeacherCache, TeacherExpense
from distilvlm.teachers.nearness import measure, told

logger = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two lines of progress in a run's log."""


class Teaching:
    """What a recipe's stages ask of a cached teacher, and what of it is missing.

    Args:
        data: stage -> what it trains on; stages that ask nothing of the teacher in training don't count.
        rank, world: of `world` processes that are given the same, this one.

    Raises:
        FeatureError, TeacherError, NotHere: as `TeacherCache`.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: VLM,
        data: Mapping[str, StageData],
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.recipe, self.data, self.rank, self.world = recipe, data, rank, world
        self.cache = TeacherCache(recipe, student, device)
        self.asked: Asked = self.cache.asked(
            {
                stage.name: (data[stage.name], shown(recipe, index, data[stage.name]))
                for index, stage in enumerate(recipe.stages)
                if stage.loss.compares and stage.name in data
            }
        )
        self.complete = self.cache.complete(self.asked)

    def expense(self) -> TeacherExpense:
        """What filling takes. Raises TeacherError where there is no room for it."""
        found = self.cache.expense(self.asked)
        self.cache.require_room(found)
        return found

    def share(self, progress: Callable[[int, int], object] | None = None) -> None:
        """Compute this process's share of what is missing.

        Args:
            progress: called with what is done, and its total.

        Raises:
            DataError: a record can't be loaded.
        """
        self.cache.fill(self.asked, self.rank, self.world, progress)

    def measure(self) -> None:
        """See how near to a local teacher what is kept is, when everything is."""
        measure(self.cache, self.asked, self.recipe.machine.micro_batch)
        if self.cache.spec.bits is not None:
            quantised.kept(self.cache.quantised, self.recipe, self.cache.teacher(), self.data)

    def told(self) -> list[str]:
        """How near to a local teacher's losses what is kept is, for people."""
        lines = told(self.cache, self.recipe.machine.micro_batch)
        if self.cache.quantised.exists():
            apart = quantised.Apart(**read_json(self.cache.quantised, {}))
            lines.append(quantised.told(self.cache.spec.precision, apart))
        return lines


def shown(recipe: Recipe, index: int, data: StageData) -> Collection[int]:
    """The samples that stage `index` shows, and those that the doctor tries its terms on."""
    optim, order = recipe.stages[index].optim, stage_order(recipe, index, data)
    updates = order.total_updates(optim.epochs, optim.updates)
    if updates >= order.updates_per_epoch and all(weight >= 1 for _, weight in data.mixture):
        return range(len(data))
    found = {sample for number in range(updates) for _, sample in order.update(number)}
    return sorted(found | tried(data).keys())


def described(expense: TeacherExpense, world: int) -> str:
    """What filling takes, for people."""
    if not expense.records:
        return "the teacher's cache is full"
    sources = ", ".join(f"{count:,} of '{source}'" for source, count in sorted(expense.records.items()))
    return (
        f"teacher: {sum(expense.records.values()):,} records to look at ({sources}), {as_bytes(expense.bytes)}, about "
        f"{as_seconds(expense.seconds / world)}, {world} at work"
    )


def fill_before_run(recipe: Recipe, student: VLM, data: Mapping[str, StageData], accelerator: Accelerator) -> None:
    """Fill what is missing when a run begins, or is continued; the teacher is in memory only as long as that takes.
    Errors as `Teaching`, and TeacherError where another run fills the same cache and is not done."""
    rank, world, wait = accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
    teaching = Teaching(recipe, student, data, accelerator.device, rank, world)
    wait()  # nobody writes before everybody has seen what is missing
    if not teaching.complete:
        if accelerator.is_main_process:
            logger.info("%s", described(teaching.expense(), world))
        teaching.share(_log() if accelerator.is_main_process else None)
        wait()
        teaching.cache.require(teaching.asked)
        if accelerator.is_main_process:
            teaching.measure()
        wait()
    teaching.cache.release()
    if accelerator.is_main_process:
        for line in teaching.told():
            logger.info("%s", line)


def _log() -> Callable[[int, int], None]:
    """Progress, a line now and then."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            logger.info("teacher's cache: %d of %d", done, total)

    return progress
