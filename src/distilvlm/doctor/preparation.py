"""From a recipe file to an examination; what can't be had on the way is a finding, too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from distilvlm.data import DataError, DataReport, Source, StageData
from distilvlm.data.alignment import TeacherView
from distilvlm.data.stage import source_of, stage_data
from distilvlm.losses import Standardisation
from distilvlm.models import NotHere
from distilvlm.models.alone import Encoder
from distilvlm.models.compose import build_student
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, RecipeError, load_recipe
from distilvlm.teachers import Teacher, TeacherError, require
from distilvlm.teachers.build import open_teacher
from distilvlm.teachers.encoders import EncoderTeachers, Shape, shapes
from distilvlm.teachers.interface import TERMS
from distilvlm.teachers.loading import local_teacher, weights_of
from distilvlm.train import objective_of
from distilvlm.train.encoders import adapt, adapters_of

from . import adaptors, encoders, experts, parts, preferences, settings, visual, vocabulary
from .examination import examine
from .finding import Finding
from .shapes import shapes as shapes_of
from .template import spread

logger = logging.getLogger(__name__)

LOOKED_AT = 1_000
"""Rows of a stage that are encoded; a run looks at all of them."""

SERVER_FIX = {
    "distilvlm": "start it on its machine (distilvlm teach MODEL), or mend what is named",
    "openai": "start it on its machine (vllm serve MODEL --max-logprobs N, or SGLang's server), or mend what is named",
}
"""Of a teacher elsewhere, by `teacher.remote.protocol`."""

ENCODERS_FIX = "put its weights there, name another in encoders.NAME.from, or mend what is named"

T = TypeVar("T")


def doctor(
    recipe_path: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    directory: str | Path | None = None,
) -> list[Finding]:
    """Examine a recipe without running it, in seconds. Never raises for what a user can mend.

    Args:
        overrides: as `distilvlm.run`'s.
        directory: the run's, for disk space; default `runs/NAME`.
    """
    try:
        recipe = load_recipe(recipe_path, overrides)
    except RecipeError as error:
        return [Finding("recipe.fields", "error", str(error), "mend the fields that are named")]
    return _Patient(recipe, Path(directory) if directory is not None else Path("runs") / recipe.name).findings()


class _Patient:
    """A recipe's student, teacher and data, as far as they can be had."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe, self.directory = recipe, directory
        self.missing: list[Finding] = []
        self.device = _device()

    def findings(self) -> list[Finding]:
        recipe = self.recipe
        student = self._had("student.weights", self._student, "download them first, or name a directory in student")
        sources = self._sources()
        needed = recipe.teacher is not None and any(stage.loss.needs_teacher for stage in recipe.stages)
        elsewhere = recipe.teacher.remote if recipe.teacher is not None and recipe.teacher.kind == "remote" else None
        vlm = None
        if needed and elsewhere is None:
            vlm = self._had("teacher.weights", lambda: weights_of(recipe), "name another teacher (teacher.from)")
        if student is None:
            return [*self.missing, *self._planned()]
        encoder_shapes = self._had("encoders.weights", lambda: self._adapted(student), ENCODERS_FIX) or {}
        teachers = None
        if encoder_shapes:
            make = lambda: EncoderTeachers(recipe, student, self.device)  # noqa: E731
            teachers = self._had("encoders.weights", make, ENCODERS_FIX)
        unlike: list[Finding] = []
        if vlm is not None and isinstance(student, VLM):  # what a teacher would refuse is better told here
            compared = [*vocabulary.check(recipe, student, vlm), *visual.check(recipe, student, vlm)]
            unlike = [finding for finding in compared if finding.level == "error"]
        teacher: Teacher | None = None
        if isinstance(student, VLM) and needed and elsewhere is not None:
            teacher = self._had("teacher.server", lambda: self._asked(student), SERVER_FIX[elsewhere.protocol])
            if teacher is not None:
                self.missing += _given(recipe, teacher, elsewhere.url)
        if isinstance(student, VLM) and vlm is not None and not unlike:
            teacher = self._had(
                "teacher.weights",
                lambda: local_teacher(recipe, student, self.device, vlm),
                "name another teacher (teacher.from)",
            )
        data = self._data(student, sources, None if teacher is None else teacher.view)
        reports, look = self._reports(data), None if teachers is None else teachers.of_paths

        def examined(teacher: Teacher | None) -> list[Finding]:
            return examine(recipe, student, teacher, data, reports, self.directory, look, encoder_shapes)

        found = None
        if elsewhere is not None and teacher is not None:  # what it says to a question may be of no use, or end early
            found = self._had("teacher.targets", lambda: examined(teacher), SERVER_FIX[elsewhere.protocol])
            teacher = None
        if found is None:
            found = examined(teacher)
        told = {finding.check for finding in unlike}
        return [*self.missing, *unlike, *(finding for finding in found if finding.check not in told)]

    def _had(self, check: str, make: Callable[[], T], fix: str) -> T | None:
        """What `make` gives, or None and a finding; a checkpoint that is damaged can raise anything."""
        try:
            return make()
        except NotHere as error:
            made = error.path.parent if error.path.name == "model" else None
            if made is not None:
                fix = f"train it first: distilvlm run RECIPE --dir {made}"
            self.missing.append(Finding(check, "error", f"'{error.path}' is not here", fix))
        except DataError as error:
            self.missing.append(Finding(check, "error", str(error), fix))
        except Exception as error:
            logger.debug("%s", check, exc_info=True)
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            self.missing.append(Finding(check, "error", f"{kind}{error}", fix))
        return None

    def _student(self) -> VLM | Encoder:
        return build_student(self.recipe.student, self.recipe.seed).to(self.device)

    def _adapted(self, student: VLM | Encoder) -> dict[str, Shape]:
        """What encoders give; the student gets the adapters to them."""
        found = shapes(self.recipe, student)
        adapt(self.recipe, student, found)
        adapters = adapters_of(student.model)
        if adapters is not None and adapters.rules.standardise:  # by no statistics, which a run takes first
            for name, form in adapters.teachers.items():
                one = Standardisation(torch.zeros(form.channels), torch.eye(form.channels), torch.ones(()))
                adapters.standardise(name, one)
        return found

    def _planned(self) -> list[Finding]:
        """What can be said without the student's weights."""
        outline = self._outline()
        students, found = ({}, []) if outline is None else shapes_of(self.recipe, outline)
        found += settings.check(self.recipe, students, None, {})
        found += [*experts.check(self.recipe, students), *encoders.check(self.recipe, students)]
        found += preferences.check(self.recipe, {}, {})
        if outline is not None and not any(finding.check == "settings.parts" for finding in found):
            found += adaptors.check(self.recipe, students)
            found += [*visual.check(self.recipe, outline, None), *parts.check(self.recipe, outline, students, None, {})]
        return found

    def _outline(self) -> VLM | Encoder | None:
        """The student without weights, where its architecture is known: enough to know its parts."""
        try:
            student = build_student(self.recipe.student, self.recipe.seed, meta=True)
            adapt(self.recipe, student, shapes(self.recipe, student, {}))
            return student
        except (ValueError, OSError):
            return None

    def _asked(self, student: VLM) -> Teacher:
        """A teacher elsewhere, for which a run would wait."""
        assert self.recipe.teacher is not None and self.recipe.teacher.remote is not None
        remote = self.recipe.teacher.remote.model_copy(update={"patience": 0.0})
        spec = self.recipe.teacher.model_copy(update={"remote": remote})
        return open_teacher(self.recipe.model_copy(update={"teacher": spec}), student, self.device)

    def _sources(self) -> dict[tuple[str, bool], Source]:
        """Data's name, and whether its pictures alone are looked at -> the source."""
        used = {(name, stage.pictures_alone): stage for stage in self.recipe.stages for name in stage.data}
        sources = {
            key: self._had(
                "data.file",
                lambda stage=stage, name=key[0]: source_of(self.recipe, stage, name),
                f"put the file there or mend it, or name another in data.{key[0]}",
            )
            for key, stage in used.items()
        }
        return {key: source for key, source in sources.items() if source is not None}

    def _data(
        self, student: VLM | Encoder, every: Mapping[tuple[str, bool], Source], view: TeacherView | None
    ) -> dict[str, StageData]:
        made: dict[tuple[Any, ...], StageData | None] = {}
        data: dict[str, StageData] = {}
        for stage in self.recipe.stages:
            alone = stage.pictures_alone
            if not all((name, alone) in every for name in stage.data):
                continue  # the file that is not there is told already
            sources = {name: every[name, alone] for name in stage.data}
            own = list(sources.values())
            beside = view if stage.loss.compares else None
            key = (stage.max_length, alone, beside is None, *stage.data)
            if key not in made:  # stages that see the same rows share them, and their faults
                made[key] = self._had(
                    "data.rows",
                    lambda stage=stage, own=own: stage_data(
                        self.recipe, stage, student.tokenizer, student.layout, own, teacher=view
                    ),
                    _where_to_look(stage.data, sources),
                )
            if (rows := made[key]) is not None:
                data[stage.name] = rows
        return data

    def _reports(self, data: Mapping[str, StageData]) -> dict[str, DataReport]:
        """Of evenly spread rows; stages that share their rows share a report."""
        different = {id(rows): rows for rows in data.values()}
        made = {key: rows.check(indices=spread(range(len(rows)), LOOKED_AT)) for key, rows in different.items()}
        return {name: made[id(rows)] for name, rows in data.items()}


def _given(recipe: Recipe, teacher: Teacher, url: str) -> list[Finding]:
    """What a teacher elsewhere says that it can give, beside what stages need of it."""
    given = [term for need, term in TERMS.items() if need in teacher.provides]
    found = [Finding("teacher.server", "ok", f"{url} answers, and gives targets of {', '.join(given)} terms")]
    for stage in recipe.stages:
        try:
            if stage.loss.compares:
                require(teacher, objective_of(stage, recipe.teacher).needs, stage.name)
        except TeacherError as error:
            fix = "give the teacher another kind, or leave the terms out"
            found.append(Finding("teacher.server", "error", str(error), fix, stage.name))
    return found


def _where_to_look(names: Sequence[str], sources: Mapping[str, Source]) -> str:
    bad = [row for name in names for row in sources[name].bad]
    if bad:
        return f"mend the rows, or set data.{bad[0].key.source}.images; the first: {bad[0]}"
    return f"look at {' and '.join(f'data.{name}' for name in names)}: the template must suit the tokenizer"


def _device() -> torch.device:
    # Asked first: a build for CUDA names CUDA as its accelerator on a machine without one, too.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
