"""Is there room for what a run writes: checkpoints, finished stages, the model, kept features?"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from distilvlm.data import StageData
from distilvlm.models.alone import Encoder
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec
from distilvlm.teachers.encoder_cache import kept_bytes
from distilvlm.teachers.encoders import Shape, width
from distilvlm.teachers.references import BYTES

from . import parts
from .finding import Finding
from .settings import updates_of

FLOAT = 4
"""Bytes of a trained weight and of each of Adam's two moments, and of a kept feature."""

COMFORTABLE = 2.0
"""Times what is needed that should be free; below, one is told."""

EXACT = 20_000
"""Records whose pictures are counted by name; of more, a picture in two sources counts twice."""


def check(
    recipe: Recipe,
    shapes: Mapping[str, VLM | Encoder],
    data: Mapping[str, StageData],
    directory: Path,
    encoders: Mapping[str, Shape],
) -> list[Finding]:
    """One finding per file system that the run writes to. `shapes`: stage -> the student as it trains there;
    `encoders`: of what form their features are, which a cache keeps."""
    needs = {directory: max(0, run_bytes(recipe, shapes, data) - _held(directory))}
    if recipe.pictures.features is not None and shapes:
        store = Path(recipe.pictures.features)
        needs[store] = max(0, _features_bytes(next(iter(shapes.values())), data) - _held(store))
    if recipe.cache is not None:
        store = Path(recipe.cache.path)
        pictures = _pictures([data[stage.name] for stage in recipe.stages if stage.loss.encoder and stage.name in data])
        whole = pictures * sum(kept_bytes(recipe.cache, shape) for shape in encoders.values())
        needs[store] = max(0, whole - _held(store))
    by_device: dict[int, list[tuple[Path, int]]] = {}
    for place, bytes in needs.items():
        by_device.setdefault(_existing(place).stat().st_dev, []).append((place, bytes))
    return [_room(places) for places in by_device.values()]


def run_bytes(recipe: Recipe, shapes: Mapping[str, VLM | Encoder], data: Mapping[str, StageData]) -> int:
    """The most that a run directory holds at a time: finished stages, what a teacher thinks of preferences, a stage's
    checkpoints, the model."""
    finals, checkpoints, model = 0, 0, 0
    for stage in recipe.stages:
        if stage.name not in shapes:
            continue
        student = shapes[stage.name]
        weights = FLOAT * sum(p.numel() for m in parts.trained(student, stage.train).values() for p in m.values())
        finals += weights
        if stage.loss.preference and stage.name in data:
            finals += BYTES * len(data[stage.name])
        checkpoints = max(checkpoints, 3 * weights * _checkpoints(recipe, stage, data))
        saved = student.trees[1:] if student.adaptors else student.trees  # adaptors go without their base
        model = sum(p.numel() * p.element_size() for tree in saved for p in tree.parameters())
    return finals + checkpoints + model


def _checkpoints(recipe: Recipe, stage: StageSpec, data: Mapping[str, StageData]) -> int:
    """Checkpoints at a time: the oldest goes when the newest is there."""
    most = recipe.machine.keep + 1
    if stage.name not in data:
        return most
    updates = updates_of(stage, data[stage.name])
    return min(most, math.ceil(updates / recipe.machine.checkpoint_every) - 1)


def _features_bytes(student: VLM | Encoder, data: Mapping[str, StageData]) -> int:
    return _pictures(list(data.values())) * student.layout.placeholders * width(student) * FLOAT


def _pictures(data: Sequence[StageData]) -> int:
    """Different ones that stages show."""
    sources = {(source.name, rows.pictures_alone): source for rows in data for source in rows.sources}
    if sum(len(source.records) for source in sources.values()) <= EXACT:
        return len({path for source in sources.values() for record in source.records for path in record.images})
    return sum(int(source.records.pictures.sum()) for source in sources.values())


def _room(places: list[tuple[Path, int]]) -> Finding:
    needed = sum(bytes for _, bytes in places)
    free = shutil.disk_usage(_existing(places[0][0])).free
    names = " and ".join(str(place) for place, _ in places)
    text = f"{names} may grow by {_readable(needed)}, {_readable(free)} are free"
    if free >= COMFORTABLE * needed:
        return Finding("disk.space", "ok", text)
    fix = "free some space, give another --dir, or set machine.keep=1 (fewer checkpoints)"
    return Finding("disk.space", "error" if free < needed else "warning", text, fix)


def _held(directory: Path) -> int:
    """Bytes that a run or a store that goes on has written already."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) if directory.is_dir() else 0


def _existing(place: Path) -> Path:
    place = place.absolute()
    return next(path for path in (place, *place.parents) if path.exists())


def _readable(bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if bytes < 1000:
            return f"{bytes:.3g} {unit}"
        bytes /= 1000
    return f"{bytes:.3g} TB"
