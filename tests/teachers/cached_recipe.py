"""A tiny recipe whose teacher is cached, and what its stages show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distilvlm.data import StageData
from distilvlm.data.stage import source_of, stage_data
from distilvlm.models.compose import build
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, load_recipe
from distilvlm.runs.teaching import Teaching
from tests.runs.tiny import write_recipe

CPU = torch.device("cpu")


def written(directory: Path, rows: int = 10, **keep: Any) -> Path:
    """The recipe's file. Pictures are not augmented; the teacher's cache lies beside it."""
    path = write_recipe(directory, rows, pictures={})
    text = path.read_text()
    kept = {"path": str(directory / "kept"), **keep}
    path.write_text(text.replace("teacher:\n", f"teacher:\n  kind: cached\n  keep: {kept}\n"))
    return path


def data_of(recipe: Recipe, student: VLM) -> dict[str, StageData]:
    return {
        stage.name: stage_data(
            recipe, stage, student.tokenizer, student.layout, [source_of(recipe, stage, name) for name in stage.data]
        )
        for stage in recipe.stages
    }


def teaching(recipe: Recipe, student: VLM | None = None, rank: int = 0, world: int = 1) -> Teaching:
    student = student or build(recipe.student, recipe.seed)
    return Teaching(recipe, student, data_of(recipe, student), CPU, rank, world)


def filled(recipe: Recipe, student: VLM | None = None) -> Teaching:
    found = teaching(recipe, student)
    found.share()
    found.measure()
    return found


def loaded(path: Path, **changes: Any) -> Recipe:
    return load_recipe(path, changes)
