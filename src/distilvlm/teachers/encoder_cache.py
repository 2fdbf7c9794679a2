"""Features of encoders that teach, on disk: computed once per picture, for all runs that see it.

    CACHE/NAME/    one store for each encoder (models/kept.py), refused if what made it has changed

A picture is known by its content. A store is its encoder's alone (weights, class, preprocessing, layer, canvas), so
another teacher is added to a recipe without computing the others again. What a training reads is what its encoders
would give it, rounded to the precision that it is kept in.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distilvlm.data.geometry import canvas, decode
from distilvlm.data.stage import background
from distilvlm.models.alone import Encoder
from distilvlm.models.kept import PictureReader, PictureStore
from distilvlm.models.vlm import VLM
from distilvlm.recipe import CacheSpec, Recipe

from .encoders import SEPARATOR, EncoderTeachers, Shape, tensors_of
from .interface import TeacherError

BATCH = 8
"""Pictures per forward of an encoder that fills its store."""

HASHES = 150
"""Bytes that a picture takes in a store beside its tensors: its own hash and its features', about."""

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Expense:
    """What filling one encoder's store takes."""

    name: str
    missing: int  # pictures to compute
    bytes: int  # on disk, for these
    seconds: float  # of one process, decoding not counted


class SeenReader:
    """Picture file -> what every encoder saw in it. Can be pickled and forked, as the readers in it."""

    def __init__(self, readers: dict[str, PictureReader]) -> None:
        self._readers = readers

    def __call__(self, path: str) -> dict[str, Tensor]:
        """Raises FeatureError for a picture that has nothing in a store; says what to do."""
        return {
            f"{name}{SEPARATOR}{field}": value
            for name, reader in self._readers.items()
            for field, value in reader.read(path).items()
        }


def kept_bytes(cache: CacheSpec, shape: Shape) -> int:
    """Bytes of a picture's tokens in the cache of an encoder: about all that there is; where it looks takes little."""
    return HASHES + shape.tokens * shape.channels * _DTYPES[cache.precision].itemsize


class EncoderCache:
    """The stores of all encoders that a recipe uses.

    Raises:
        FeatureError: a store was made otherwise; says what of teacher, preprocessing or layer has changed.
    """

    def __init__(self, recipe: Recipe, teachers: EncoderTeachers, student: VLM | Encoder) -> None:
        assert recipe.cache is not None
        self.recipe, self.teachers = recipe, teachers
        self._dtype = _DTYPES[recipe.cache.precision]
        self._background = background(student.layout)
        self._probes = {name: self._kept(name, self._blank(name, 1)) for name in teachers.encoders}
        self.stores = {
            name: PictureStore(Path(recipe.cache.path) / name, self._made_with(name)) for name in teachers.encoders
        }

    def expense(self, paths: Collection[str]) -> list[Expense]:
        """What filling the stores with these pictures takes; every encoder is timed on blank ones."""
        found: list[Expense] = []
        for name, store in self.stores.items():
            missing = store.missing_of(paths)
            each = HASHES + sum(value.numel() * value.element_size() for value in self._probes[name].values())
            seconds = self._time(name) * missing if missing else 0.0
            found.append(Expense(name, missing, each * missing, seconds))
        return found

    def require_room(self, expenses: Collection[Expense]) -> None:
        """Raises TeacherError where the disk has less room than the stores would take."""
        place = next(store.directory.parent for store in self.stores.values())
        needed, free = sum(one.bytes for one in expenses), shutil.disk_usage(place).free
        if needed > free:
            raise TeacherError(
                f"the encoders' features need {needed / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free: give "
                "another cache.path, set encoders.NAME.pool (fewer tokens) or leave 'cache' out"
            )

    def fill(
        self,
        paths: Collection[str],
        rank: int = 0,
        world: int = 1,
        threads: int = 0,
        progress: Callable[[str, int, int], object] | None = None,
    ) -> dict[str, str]:
        """Compute what is missing, every process its share of the shards; go on after a kill by calling it again.

        Args:
            progress: called with an encoder, the pictures of it that are done, and their total.

        Returns:
            path -> reason of pictures that could not be read, where the recipe quarantines such.

        Raises:
            FeatureError: names the picture that could not be read, unless the recipe quarantines them.
        """
        unreadable: dict[str, str] = {}
        for name, store in self.stores.items():
            unreadable |= store.fill_with(
                paths,
                lambda canvases, name=name: self._kept(name, canvases),
                lambda path, name=name: canvas(
                    decode(path), self.recipe.pictures.geometry, self.teachers.sides[name], self._background
                ),
                self.teachers.sides[name],
                BATCH,
                rank,
                world,
                self.recipe.machine.on_bad_row == "quarantine",
                None if progress is None else lambda done, total, name=name: progress(name, done, total),
                threads,
            )
        return unreadable

    def reader(self) -> SeenReader:
        return SeenReader({name: PictureReader(store.directory) for name, store in self.stores.items()})

    def _made_with(self, name: str) -> dict[str, object]:
        """By the names that a refusal calls them."""
        made = dict(self.teachers.encoders[name].made_with)
        spec = self.recipe.encoders[name]
        return {
            "version": 1,
            "teacher: weights": made.pop("weights"),
            "teacher: class": made.pop("class"),
            "preprocessing: size, mean and deviation": made.pop("view"),
            "preprocessing: geometry": self.recipe.pictures.geometry,
            "preprocessing: side of the canvas": self.teachers.sides[name],
            "preprocessing: colour of padding": list(self._background),
            "layer": made,  # and what else its kind reads by
            "pool": spec.pool,
            "precision": None if self.recipe.cache is None else self.recipe.cache.precision,
            "holds": sorted(self._probes[name]),
        }

    def _kept(self, name: str, canvases: Tensor) -> dict[str, Tensor]:
        seen = tensors_of(self.teachers.look(name, canvases))
        # Where an encoder looks takes little room, and weighs everything else.
        rounded = {field: self._dtype for field in ("tokens", "cls")}
        return {field: value.to("cpu", rounded.get(field, torch.float32)) for field, value in seen.items()}

    def _blank(self, name: str, pictures: int) -> Tensor:
        return torch.zeros(pictures, 3, self.teachers.sides[name], self.teachers.sides[name], dtype=torch.uint8)

    def _time(self, name: str) -> float:
        """Seconds per picture, of one batch."""
        canvases = self._blank(name, BATCH)
        start = time.perf_counter()
        self._kept(name, canvases)
        return (time.perf_counter() - start) / BATCH
