"""Filling the caches of a recipe, its teacher's and its encoders', without running the recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distilvlm.data import StageData, raise_or_quarantine
from distilvlm.data.stage import source_of, stage_data
from distilvlm.models.compose import build_student
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, RecipeError, load_recipe
from distilvlm.teachers.cache import TeacherExpense
from distilvlm.teachers.encoder_cache import EncoderCache, Expense
from distilvlm.teachers.encoders import EncoderTeachers, used

from . import encoders
from .encoders import pictures_of
from .teaching import Teaching, described

TEACHER = "teacher."
"""What progress of the teacher's cache is told under; no encoder can have that name."""


class Filling:
    """What a recipe's caches lack. Of several processes (torchrun's), each computes its share.

    Raises:
        RecipeError: the recipe is wrong, or keeps nothing.
        DataError: rows can't be used, and the recipe wants to stop at them.
        FeatureError: a store was made otherwise; says what has changed.
        TeacherError: there is no room for what is missing.
    """

    def __init__(self, recipe: str | Path | Recipe, overrides: Mapping[str, Any] | Sequence[str] = ()) -> None:
        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe, overrides)
        teaches = recipe.teacher is not None and recipe.teacher.kind == "cached"
        teaches = teaches and any(stage.loss.compares for stage in recipe.stages)
        if not teaches and recipe.cache is None:
            raise RecipeError(
                f"recipe '{recipe.name}' keeps nothing of a teacher or of encoders: let it keep what its teacher "
                "thinks (--set teacher.kind=cached), or what its encoders see (--set cache.path=DIR)"
            )
        if not teaches and not used(recipe):
            raise RecipeError(
                f"recipe '{recipe.name}': no stage compares with encoders (loss.encoder): nothing to keep"
            )
        self.rank, self.world = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        student = build_student(recipe.student, recipe.seed)
        self._cache: EncoderCache | None = None
        self.pictures: list[str] = []
        self.expenses: list[Expense] = []
        if recipe.cache is not None and used(recipe):
            self._cache = EncoderCache(recipe, EncoderTeachers(recipe, student, _device()), student)
            self.pictures = pictures_of(recipe, recipe.stages)
            self.expenses = self._cache.expense(self.pictures)
            self._cache.require_room(self.expenses)
        self._teaching: Teaching | None = None
        self._told: list[str] = []
        self.teacher_expense: TeacherExpense | None = None
        if teaches:
            assert isinstance(student, VLM)  # the schema refuses a teacher for an encoder alone
            self._teaching = Teaching(recipe, student, _data(recipe, student), _device(), self.rank, self.world)
            self.teacher_expense = self._teaching.expense()

    def described(self) -> list[str]:
        """What it takes, for people."""
        lines = [] if self._cache is None else encoders.described(self.expenses, self.world)
        return lines if self.teacher_expense is None else [*lines, described(self.teacher_expense, self.world)]

    def fill(self, threads: int = 0, progress: Callable[[str, int, int], object] | None = None) -> dict[str, str]:
        """Compute this process's share; returns path -> reason of pictures that encoders can't be shown.

        Args:
            threads: that decode pictures for encoders.
            progress: called with an encoder, or `TEACHER`, with what of it is done, and its total.
        """
        unreadable: dict[str, str] = {}
        if self._cache is not None:
            unreadable = self._cache.fill(self.pictures, self.rank, self.world, threads, progress)
        if self._teaching is not None:
            self._teaching.share(None if progress is None else lambda done, total: progress(TEACHER, done, total))
            if self._teaching.cache.complete(self._teaching.asked):  # else others are at work still
                self._teaching.measure()
                self._told = self._teaching.told()
            self._teaching.cache.release()
        return unreadable

    def told(self) -> list[str]:
        """How near to a local teacher's losses what is kept is, for people; nothing before it is whole."""
        return self._told


def _data(recipe: Recipe, student: VLM) -> dict[str, StageData]:
    """Stage -> what it trains on, of those that compare with the teacher; without rows that can't be used."""
    found: dict[str, StageData] = {}
    for stage in recipe.stages:
        if stage.loss.compares:
            sources = [source_of(recipe, stage, name) for name in stage.data]
            data = stage_data(recipe, stage, student.tokenizer, student.layout, sources)
            bad = data.check().bad
            raise_or_quarantine(bad, recipe.machine.on_bad_row)
            found[stage.name] = data.without(bad) if bad else data
    return found


def _device() -> torch.device:
    """A card for each process of a machine."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", 0)))
