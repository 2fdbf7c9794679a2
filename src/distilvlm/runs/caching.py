"""Filling the cache of a recipe's encoders without running the recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distilvlm.models.compose import build_student
from distilvlm.recipe import Recipe, RecipeError, load_recipe
from distilvlm.teachers.encoder_cache import EncoderCache
from distilvlm.teachers.encoders import EncoderTeachers, used

from .encoders import described, pictures_of


class Filling:
    """What a recipe's cache lacks. Of several processes (torchrun's), each computes its share.

    Raises:
        RecipeError: the recipe is wrong, or keeps nothing.
        FeatureError: a store was made otherwise; says what has changed.
        TeacherError: there is no room for what is missing.
    """

    def __init__(self, recipe: str | Path | Recipe, overrides: Mapping[str, Any] | Sequence[str] = ()) -> None:
        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe, overrides)
        if recipe.cache is None:
            raise RecipeError(
                f"recipe '{recipe.name}' keeps no features of encoders: name a directory (--set cache.path=DIR)"
            )
        if not used(recipe):
            raise RecipeError(
                f"recipe '{recipe.name}': no stage compares with encoders (loss.encoder): nothing to keep"
            )
        self.rank, self.world = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        student = build_student(recipe.student, recipe.seed)
        teachers = EncoderTeachers(recipe, student, _device())
        self._cache = EncoderCache(recipe, teachers, student)
        self.pictures = pictures_of(recipe, recipe.stages)
        self.expenses = self._cache.expense(self.pictures)
        self._cache.require_room(self.expenses)

    def described(self) -> list[str]:
        """What it takes, for people."""
        return described(self.expenses, self.world)

    def fill(self, threads: int = 0, progress: Callable[[str, int, int], object] | None = None) -> dict[str, str]:
        """Compute this process's share; returns path -> reason of pictures that can't be read.

        Args:
            threads: that decode pictures.
            progress: called with an encoder, the pictures of it that are done, and their total.
        """
        return self._cache.fill(self.pictures, self.rank, self.world, threads, progress)


def _device() -> torch.device:
    """A card for each process of a machine."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", 0)))
