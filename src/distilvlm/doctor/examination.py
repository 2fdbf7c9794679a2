"""All checks of a recipe whose student, teacher and data are at hand. Changes nothing and draws nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distilvlm.data import DataReport, StageData
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.teachers import LocalTeacher

from . import disk, parts, rows, settings, template, terms, visual, vocabulary
from .finding import Finding
from .trial import untouched


def examine(
    recipe: Recipe,
    student: VLM,
    teacher: LocalTeacher | None,
    data: Mapping[str, StageData],
    reports: Mapping[str, DataReport],
    directory: Path | None,
) -> list[Finding]:
    """Look at everything that a run of `recipe` is about to use.

    Weights, what trains, gradients, modes and random states of both models are what they were, bit for bit. Memory: the
    gradients of what trains, as in training.

    Args:
        student: as the first stage finds it, all of it on one device.
        teacher: None where no stage needs one.
        data, reports: by the stage's name; stages that are not there are not looked at. A report may be of some rows.
        directory: the run's, for disk space; None: not looked at.
    """
    their = None if teacher is None else teacher.vlm
    found = [
        *vocabulary.check(recipe, student, their),
        *visual.check(recipe, student, their),
        *template.check(data),
        *_rows(recipe, student, their, data, reports),
        *settings.check(recipe, student, their, data),
    ]
    if recipe.pictures.features is not None and teacher is not None and not teacher.shares_vision:
        found.append(visual.other_tower(recipe))
    if not any(finding.check == "settings.parts" for finding in found):
        found += parts.check(recipe, student, their, data)
        if not any(finding.check == "visual.features" for finding in found):
            found += _terms(recipe, student, teacher, data)
        if directory is not None:
            found += disk.check(recipe, student, data, directory)
    return found


def _rows(
    recipe: Recipe,
    student: VLM,
    teacher: VLM | None,
    data: Mapping[str, StageData],
    reports: Mapping[str, DataReport],
) -> list[Finding]:
    return [
        finding
        for stage in recipe.stages
        if stage.name in data and stage.name in reports
        for finding in rows.check(recipe, stage, student, teacher, data[stage.name], reports[stage.name])
    ]


def _terms(recipe: Recipe, student: VLM, teacher: LocalTeacher | None, data: Mapping[str, StageData]) -> list[Finding]:
    found: list[Finding] = []
    models = [student.model] if teacher is None else [student.model, teacher.vlm.model]
    for stage in recipe.stages:
        if stage.name in data:
            with untouched(*models):
                found += terms.check(recipe, stage, student, teacher, data[stage.name])
    return found
