"""Vision encoders that teach: frozen, outside of what is wrapped, asked in this process or read from what is kept.

Encoders see ONE canvas per picture, made in the loader's workers with the geometry of the student's. One that takes
pictures of the student's size sees the student's own canvas, so that the anchor sees what the student sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from distilvlm.data.batch import Batch
from distilvlm.data.geometry import canvas, decode
from distilvlm.data.stage import background
from distilvlm.models.alone import Encoder
from distilvlm.models.encoders import EncoderTeacher, Seen, build_encoder, frozen_copy
from distilvlm.models.vlm import VLM
from distilvlm.recipe import ANCHOR, EncoderSpec, Recipe, StageSpec

from .interface import TeacherError

SEPARATOR = "/"
"""Between an encoder's name and a field of what it saw, in a batch."""


@dataclass(frozen=True)
class Shape:
    """What an encoder gives of a picture, pooled if the recipe says so."""

    size: int  # side of its pictures in pixels
    grid: tuple[int, int]
    channels: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


Look = Callable[[Sequence[str], StageSpec], Mapping[str, Seen]]
"""Picture files, and the stage whose encoders see them -> what each saw."""


def shapes(recipe: Recipe, student: VLM | Encoder, missing: dict[str, str] | None = None) -> dict[str, Shape]:
    """Encoder -> what it gives, of all that a stage of the recipe uses; no weights are loaded.

    Args:
        missing: for a plan; takes the encoders that cannot be had now, each with the reason, instead of raising.

    Raises:
        NotHere, OSError, ValueError, ImportError: as `build_encoder`.
        TeacherError: an encoder cannot be pooled as wanted, or an anchor has other tokens than the student.
    """
    found: dict[str, Shape] = {}
    for name in used(recipe):
        try:
            found[name] = _shape(name, recipe.encoders[name], student, recipe.seed)
        except (OSError, ImportError) as error:
            if missing is None:
                raise
            missing[name] = str(error)
    if ANCHOR in found:
        _check_anchor(found[ANCHOR], student)
    return found


def used(recipe: Recipe) -> list[str]:
    """The encoders that stages compare with, or whose attention weighs; in the recipe's order."""
    wanted = {name for stage in recipe.stages if stage.loss.encoder for name in of_stage(recipe, stage)}
    return [name for name in recipe.encoders if name in wanted]


def of_stage(recipe: Recipe, stage: StageSpec) -> list[str]:
    """The encoders that a stage needs to see its pictures: its teachers, and what weighs tokens and teachers."""
    names = list(recipe.teachers_of(stage))
    if not stage.loss.encoder:
        return names
    if stage.encoder.teacher_weights != "none":
        names.append(ANCHOR)
    if (source := importance_source(stage)) is not None:
        names.append(source)
    return list(dict.fromkeys(names))


def importance_source(stage: StageSpec) -> str | None:
    """The encoder whose attention weighs a stage's tokens, if any does; where the anchor has no CLS, it also says what
    teachers are scored against."""
    how = stage.encoder
    if not stage.loss.encoder or (how.token_weights == "none" and how.teacher_weights == "none"):
        return None
    return how.importance or ANCHOR


def canvas_size(recipe: Recipe, student: VLM | Encoder, found: Mapping[str, Shape]) -> int | None:
    """Side of the canvas that encoders see beside the student's, at the largest size that one of them needs; None where
    the student's will do for all."""
    own = student.layout.size
    wanted = [shape.size for shape in found.values() if shape.size != own or recipe.pictures.features is not None]
    largest = max(wanted, default=0)
    return largest if largest > own or (wanted and recipe.pictures.features is not None) else None


class EncoderTeachers:
    """The encoders of a recipe, with their weights.

    Args:
        student: with its initial weights, which the anchor keeps.

    Raises:
        as `shapes`; TeacherError also for one that is to weigh tokens and has no attention.
    """

    def __init__(self, recipe: Recipe, student: VLM | Encoder, device: torch.device) -> None:
        self.recipe = recipe
        self.encoders: dict[str, EncoderTeacher] = {}
        self.sources = {source for stage in recipe.stages if (source := importance_source(stage)) is not None}
        for name in used(recipe):
            encoder = _built(name, recipe.encoders[name], student, recipe.seed)
            if name in self.sources and not encoder.gives_importance:
                raise TeacherError(
                    f"encoder '{name}' has no attention that could weigh tokens or teachers: name another one in "
                    "encoder.importance (a CLIP or DINOv2), or set token_weights and teacher_weights to none"
                )
            self.encoders[name] = encoder.to(device)
        if recipe.cache is not None and ANCHOR in self.encoders and self.encoders[ANCHOR].gives_importance:
            self.sources.add(ANCHOR)  # or recipes that weigh by it and those that don't could not share what is kept
        own, large = student.layout.size, canvas_size(recipe, student, self._shapes())
        self.sides = {name: own if one.size == own or large is None else large for name, one in self.encoders.items()}
        self._background = background(student.layout)

    def see(self, batch: Batch, stage: StageSpec) -> dict[str, Seen]:
        """What the stage's encoders see in the pictures of a batch, on the batch's device; kept features as they are.
        Nothing for a batch without pictures."""
        if batch.seen is not None:
            return restored(batch.seen, self.grids)
        found: dict[str, Seen] = {}
        if batch.owners is None:
            return found
        device = batch.input_ids.device
        for name in of_stage(self.recipe, stage):
            seen = self.look(name, self.canvases(name, batch))
            found[name] = moved(seen, device)
        return found

    def of_paths(self, paths: Sequence[str], stage: StageSpec) -> dict[str, Seen]:
        """What the stage's encoders see in picture files."""
        found: dict[str, Seen] = {}
        geometry = self.recipe.pictures.geometry
        for name in of_stage(self.recipe, stage):
            side = self.sides[name]
            canvases = torch.stack([canvas(decode(path), geometry, side, self._background) for path in paths])
            found[name] = self.look(name, canvases)
        return found

    def _shapes(self) -> dict[str, Shape]:
        specs = self.recipe.encoders
        return {name: Shape(one.size, _grid(one, specs[name]), one.channels) for name, one in self.encoders.items()}

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        return {name: shape.grid for name, shape in self._shapes().items()}

    def canvases(self, name: str, batch: Batch) -> Tensor:
        """uint8 [pictures, 3, side, side] that an encoder looks at."""
        own = batch.pictures
        if own is not None and (own.shape[-1] == self.encoders[name].size or batch.canvases is None):
            return own
        assert batch.canvases is not None  # without pictures of the student's, there are larger ones
        return batch.canvases

    def look(self, name: str, canvases: Tensor) -> Seen:
        """What one encoder sees in canvases, pooled as its section says."""
        encoder = self.encoders[name]
        seen = encoder.see(encoder.pixels(canvases), importance=name in self.sources)
        pool = self.recipe.encoders[name].pool
        return seen if pool is None else pooled(seen, pool)


def restored(kept: Mapping[str, Tensor], grids: Mapping[str, tuple[int, int]]) -> dict[str, Seen]:
    """What encoders saw, out of a batch's flat tensors."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in kept.items():
        name, _, field = key.partition(SEPARATOR)
        by_name.setdefault(name, {})[field] = value
    return {name: Seen(grid=grids[name], **values) for name, values in by_name.items()}  # pyright: ignore


def tensors_of(seen: Seen) -> dict[str, Tensor]:
    """The fields of what an encoder saw that are there, to be kept."""
    return {field.name: value for field in fields(seen) if isinstance(value := getattr(seen, field.name), Tensor)}


def pooled(seen: Seen, side: int) -> Seen:
    """Tokens averaged over areas to a grid of `side` × `side`."""
    maps = seen.tokens.transpose(1, 2).unflatten(2, seen.grid)  # [pictures, C, rows, columns]
    small = nn.functional.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2).contiguous()
    return Seen(small, (side, side), seen.cls)


def _check_anchor(shape: Shape, student: VLM | Encoder) -> None:
    ours = sum(student.layout.visual), width(student)
    if (shape.tokens, shape.channels) != ours:
        raise TeacherError(
            f"encoders.{ANCHOR} gives {shape.tokens} tokens of {shape.channels} channels and the student {ours[0]} of "
            f"{ours[1]}: the two are compared as they are. Leave 'from' out (a copy of the student), or call this "
            "encoder something else, so that it gets an adapter"
        )


def width(student: VLM | Encoder) -> int:
    """Channels of the student's vision tokens."""
    return student.model.model.vision_tower.config.hidden_size  # pyright: ignore


def _shape(name: str, spec: EncoderSpec, student: VLM | Encoder, seed: int) -> Shape:
    if spec.source is None and spec.config is None:
        side = student.layout.size // student.layout.patch
        return Shape(student.layout.size, (side, side), width(student))
    encoder = build_encoder(spec, name, seed, meta=True)
    _check_pool(name, spec, encoder)
    return Shape(encoder.size, _grid(encoder, spec), encoder.channels)


def _built(name: str, spec: EncoderSpec, student: VLM | Encoder, seed: int) -> EncoderTeacher:
    if spec.source is not None or spec.config is not None:
        encoder = build_encoder(spec, name, seed)
        _check_pool(name, spec, encoder)
        return encoder
    tower: Any = student.model.model.vision_tower
    anchor = frozen_copy(tower, student.layout, name)
    if spec.precision == "bf16":
        anchor.model.to(torch.bfloat16)
    return anchor


def _grid(encoder: EncoderTeacher, spec: EncoderSpec) -> tuple[int, int]:
    return encoder.grid if spec.pool is None else (spec.pool, spec.pool)


def _check_pool(name: str, spec: EncoderSpec, encoder: EncoderTeacher) -> None:
    if spec.pool is not None and spec.pool > min(encoder.grid):
        rows, columns = encoder.grid
        raise TeacherError(f"encoders.{name}.pool is {spec.pool}, but the encoder gives only {rows}×{columns} tokens")


def moved(seen: Seen, device: torch.device) -> Seen:
    """What an encoder saw, on another device."""
    there: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors_of(seen).items()}
    return replace(seen, **there)
