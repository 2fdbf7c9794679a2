"""The encoders that teach in a run: asked in every step, or once for all of its pictures and then read from disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from distilvlm.cost.numbers import as_bytes, as_seconds
from distilvlm.data import Batch
from distilvlm.data.stage import source_of
from distilvlm.losses import Moments, Standardisation
from distilvlm.models.alone import Encoder
from distilvlm.models.encoders import Seen
from distilvlm.models.files import directory_whole, write_whole
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec
from distilvlm.teachers.encoder_cache import BATCH, EncoderCache, Expense, SeenReader
from distilvlm.teachers.encoders import EncoderTeachers, Shape, canvas_size, importance_source, restored
from distilvlm.train.encoders import adapters_of, rules_of

from .directory import RunDirectory

logger = logging.getLogger(__name__)

EXAMPLES = 6
"""Pictures of which a run keeps where the encoder looks that weighs tokens."""


WEIGHED = {
    "paper": "a patch counts by an even share plus its own share here",
    "reference": "patches count nearly alike, since a second softmax flattens these shares (the released code)",
}
"""How a stage weighs tokens, for a reader of the report."""

STATISTICS = 1024
"""Pictures whose features say how targets are standardised: 49 tokens each are 50,000 rows."""


class Encoders:
    """What stages ask their encoders, and what their data needs for it.

    Args:
        student: with its initial weights, which the anchor keeps.
        stages: those that are left to train; with a cache, their pictures are seen now.

    Raises:
        FeatureError, TeacherError: the cache was made otherwise, or has no room; an encoder cannot teach.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: VLM | Encoder,
        shapes: dict[str, Shape],
        stages: Sequence[StageSpec],
        accelerator: Accelerator,
    ) -> None:
        self.recipe, self.shapes = recipe, shapes
        self.canvas_size: int | None = None
        self.reader: SeenReader | None = None
        self.unreadable: dict[str, str] = {}
        self.teachers: EncoderTeachers | None = EncoderTeachers(recipe, student, accelerator.device)
        if recipe.cache is None:
            self.canvas_size = canvas_size(recipe, student, shapes)
            return
        cache = EncoderCache(recipe, self.teachers, student)
        paths = pictures_of(recipe, stages)
        if accelerator.is_main_process:
            expenses = cache.expense(paths)
            cache.require_room(expenses)
            for line in described(expenses, accelerator.num_processes):
                logger.info("%s", line)
        rank, world = accelerator.process_index, accelerator.num_processes
        cache.fill(paths, rank, world, recipe.machine.workers)
        accelerator.wait_for_everyone()
        self.unreadable = cache.fill(paths)  # nothing is left to compute: it tells what other processes could not read
        self.reader = cache.reader()
        self.teachers = None  # gigabytes that nothing asks any more

    def see(self, batch: Batch, stage: StageSpec) -> dict[str, Seen]:
        """What the stage's encoders see in a batch, on its device; nothing without pictures."""
        if self.teachers is not None:
            return self.teachers.see(batch, stage)
        return {} if batch.seen is None else restored(batch.seen, self.grids)

    def look(self, paths: Sequence[str], stage: StageSpec) -> dict[str, Seen]:
        """What the stage's encoders see in picture files."""
        if self.reader is None:
            assert self.teachers is not None
            return self.teachers.of_paths(paths, stage)
        found = [self.reader(path) for path in paths]
        together = {name: torch.stack([one[name] for one in found]) for name in found[0]}
        return restored(together, self.grids)

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        return {name: shape.grid for name, shape in self.shapes.items()}


def pictures_of(recipe: Recipe, stages: Iterable[StageSpec]) -> list[str]:
    """The different pictures of stages that compare with encoders."""
    found: dict[str, None] = {}
    for stage in stages:
        if stage.loss.encoder:
            for name in stage.data:
                found |= dict.fromkeys(
                    path for record in source_of(recipe, stage, name).records for path in record.images
                )
    return list(found)


def described(expenses: Iterable[Expense], world: int) -> list[str]:
    """What filling a cache takes, a line for each encoder and one for all."""
    lines = [
        f"encoder '{one.name}': {one.missing:,} pictures to see, {as_bytes(one.bytes)}, about "
        f"{as_seconds(one.seconds / world)}"
        for one in expenses
        if one.missing
    ]
    if not lines:
        return ["every encoder has seen all pictures: the cache is full"]
    size, seconds = sum(one.bytes for one in expenses), sum(one.seconds for one in expenses) / world
    return [*lines, f"in all {as_bytes(size)} and about {as_seconds(seconds)}, {world} at work"]


def keep_importance(recipe: Recipe, encoders: Encoders, place: RunDirectory) -> None:
    """Where the encoders look that weigh tokens, in some of the pictures: `importance.json`, for the report."""
    if place.importance.exists():
        return
    weighing = [stage for stage in recipe.stages if importance_source(stage) and stage.encoder.token_weights != "none"]
    readable = [path for path in pictures_of(recipe, weighing[:1]) if path not in encoders.unreadable]
    count = min(EXAMPLES, len(readable))
    paths = [readable[place * len(readable) // count] for place in range(count)]  # of every source and folder
    maps: dict[str, dict[str, Any]] = {}
    for stage in weighing:
        name = str(importance_source(stage))
        if name not in maps:
            weights = encoders.look(paths, stage)[name].importance
            assert weights is not None  # asked of every source
            rows = [[round(value, 6) for value in row] for row in weights.float().tolist()]
            maps[name] = {
                "encoder": name,
                "grid": encoders.shapes[name].grid,
                "geometry": recipe.pictures.geometry,
                "used_by": [],
                "pictures": [{"picture": p, "weights": row} for p, row in zip(paths, rows, strict=True)],
            }
        maps[name]["used_by"].append(f"stage {stage.name}: {WEIGHED[rules_of(stage).token_weights]}")
    write_whole(place.importance, (json.dumps({"maps": list(maps.values())}, indent=1) + "\n").encode())


def standardise(
    recipe: Recipe, model: nn.Module, encoders: Encoders | None, place: RunDirectory, accelerator: Accelerator
) -> None:
    """Where targets are standardised: by the first pictures' statistics, which the run keeps.

    Args:
        encoders: None where no stage is left that compares with any.
    """
    adapters = adapters_of(model)
    if adapters is None or not adapters.rules.standardise:
        return
    with accelerator.main_process_first():  # the others find what the main process has written
        if encoders is not None and not place.standards.exists():
            moments = _moments(recipe, encoders)
            found = {f"{name}.{field}": value for name, one in moments.items() for field, value in vars(one).items()}
            write_whole(place.standards, lambda partial: save_file(found, partial))
    kept = load_file(place.standards)
    for name in adapters.teachers:
        own = {field: kept[f"{name}.{field}"] for field in ("mean", "rotation", "deviation")}
        adapters.standardise(name, Standardisation(**own))


def _moments(recipe: Recipe, encoders: Encoders) -> dict[str, Standardisation]:
    """Of every teacher's tokens, over the first pictures of the first stage that compares with it."""
    found: dict[str, Standardisation] = {}
    for stage in recipe.stages:
        new = [name for name in recipe.teachers_of(stage) if name not in found]
        if not new:
            continue
        paths = [path for path in pictures_of(recipe, [stage]) if path not in encoders.unreadable][:STATISTICS]
        logger.info("targets are standardised by %d pictures: %s", len(paths), ", ".join(new))
        moments = {name: Moments() for name in new}
        for start in range(0, len(paths), BATCH):
            seen = encoders.look(paths[start : start + BATCH], stage)
            for name in new:
                moments[name].add(seen[name].tokens)
        found |= {name: own.standardisation() for name, own in moments.items()}
    return {
        name: Standardisation(*(value.cpu().contiguous() for value in vars(one).values()))
        for name, one in found.items()
    }


def take_adapters(model: nn.Module, place: RunDirectory) -> None:
    """Part a finished student from its adapters: they are kept beside it, for measuring."""
    adapters = adapters_of(model)
    if adapters is None:
        return
    state = {name: value.detach().cpu().contiguous() for name, value in adapters.state_dict().items()}
    with directory_whole(place.adapters, replace=True) as partial:
        save_file(state, partial / "adapters.safetensors")
    del model.adapters
