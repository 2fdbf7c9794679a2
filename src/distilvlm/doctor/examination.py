"""All checks of a recipe whose student, teacher and data are at hand. Changes nothing and draws nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distilvlm.data import DataReport, StageData
from distilvlm.models import routing
from distilvlm.models.alone import Encoder
from distilvlm.models.stages import choosing, made_sparse, mixed, upcycle_before, with_adaptor, with_own_tower
from distilvlm.models.upcycling import upcycled_layers
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.teachers import Teacher
from distilvlm.teachers.encoders import Look, Shape

from . import (
    adaptors,
    alignment,
    disk,
    encoders,
    experts,
    parts,
    preferences,
    rows,
    settings,
    template,
    terms,
    visual,
    vocabulary,
)
from .finding import Finding
from .shapes import shapes as shapes_of
from .trial import as_found, untouched


def examine(
    recipe: Recipe,
    student: VLM | Encoder,
    teacher: Teacher | None,
    data: Mapping[str, StageData],
    reports: Mapping[str, DataReport],
    directory: Path | None,
    look: Look | None = None,
    encoder_shapes: Mapping[str, Shape] | None = None,
) -> list[Finding]:
    """Look at everything that a run of `recipe` is about to use.

    Weights, what trains, gradients, modes and random states of both models are what they were, bit for bit. Memory: the
    gradients of what trains, as in training; where a stage makes the student sparse or inserts adaptors, these are made
    as they will be then, and share all else with the student.

    Args:
        student: as the first stage finds it, all of it on one device.
        teacher: None where no stage needs one. The weights of one that is cached or elsewhere are not looked at.
        data, reports: by the stage's name; stages that are not there are not looked at. A report may be of some rows.
        directory: the run's, for disk space; None: not looked at.
        look, encoder_shapes: what encoders see in pictures, and of what form; None where they cannot be had.
    """
    their = None if teacher is None else teacher.vlm
    shapes, refused = shapes_of(recipe, student)
    found = [
        *refused,
        *(vocabulary.check(recipe, student, their) if isinstance(student, VLM) else ()),
        *visual.check(recipe, student, their),
        *template.check(data),
        *_rows(recipe, student, their, data, reports),
        *alignment.check(recipe, reports),
        *settings.check(recipe, shapes, their, data),
        *experts.check(recipe, shapes),
        *encoders.check(recipe, shapes),
        *preferences.check(recipe, data, reports),
    ]
    sees = recipe.teacher is not None and recipe.teacher.kind != "cached"  # pictures, in training
    if recipe.pictures.features is not None and teacher is not None and sees and not teacher.shares_vision:
        found.append(visual.other_tower(recipe))
    if not refused and not any(finding.check == "settings.parts" for finding in found):
        found += [*adaptors.check(recipe, shapes), *parts.check(recipe, student, shapes, their, data)]
        refusals = [finding.check for finding in found if finding.level == "error"]
        if not {"visual.features", "experts.balance", "mixture.balance"} & {*refusals}:
            found += _terms(recipe, student, shapes, teacher, data, look, encoder_shapes or {})
        if directory is not None:
            found += disk.check(recipe, shapes, data, directory, encoder_shapes or {})
    return found


def _rows(
    recipe: Recipe,
    student: VLM | Encoder,
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


def _terms(
    recipe: Recipe,
    student: VLM | Encoder,
    shapes: Mapping[str, VLM | Encoder],
    teacher: Teacher | None,
    data: Mapping[str, StageData],
    look: Look | None,
    encoder_shapes: Mapping[str, Shape],
) -> list[Finding]:
    found: list[Finding] = []
    theirs = () if teacher is None or teacher.vlm is None else teacher.vlm.trees
    with untouched(*student.trees, *theirs), as_found(student):  # a sparse student shares most of it
        for stage in recipe.stages:
            if stage.inserts is not None and isinstance(student, VLM):
                with_adaptor(student, stage.inserts)
            if stage.name not in data or stage.name not in shapes:
                continue
            how = upcycle_before(recipe, stage)
            if how is not None and isinstance(student, VLM) and not upcycled_layers(student.model.config):
                student = made_sparse(student, how, recipe.seed)
            if stage.mixes is not None:
                student = mixed(with_own_tower(student), stage.mixes, recipe.seed)
            routing.install(student.model, *choosing(recipe, stage))  # as the run does; the weights are the same
            if preferences.fit(stage, data[stage.name]):
                with untouched(*student.trees, *theirs):
                    rows = data[stage.name]
                    found += terms.check(recipe, stage, student, teacher, rows, encoder_shapes, look)
    return found
