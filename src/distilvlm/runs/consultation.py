"""The doctor's word before a run's first step; it is kept, and an error stops the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict

from distilvlm.data import DataReport, StageData
from distilvlm.doctor import Finding, examine
from distilvlm.models.files import write_whole
from distilvlm.recipe import Recipe
from distilvlm.teachers import Teacher

from .directory import RunDirectory, RunError
from .encoders import Encoders
from .student import Student

logger = logging.getLogger(__name__)


def consult(
    recipe: Recipe,
    student: Student,
    teacher: Teacher | None,
    material: Mapping[str, tuple[StageData, DataReport]],
    place: RunDirectory,
    encoders: Encoders | None,
) -> None:
    """Examine what the run is about to use, unless it was examined when the run began. Warnings are logged.

    Args:
        material: stage -> its data and what the look at it found.

    Raises:
        RunError: the doctor found what makes the run fail or pointless; names each with its fix.
    """
    if place.doctor.exists():
        return
    data = {name: rows for name, (rows, _) in material.items()}
    reports = {name: report for name, (_, report) in material.items()}
    look = None if encoders is None else encoders.look
    found = examine(recipe, student.vlm, teacher, data, reports, place.path, look, student.shapes)
    if errors := [finding for finding in found if finding.level == "error"]:
        raise RunError("the doctor advises against this run:\n" + "\n".join(_line(finding) for finding in errors))
    for finding in found:
        if finding.level == "warning":
            logger.warning("%s", _line(finding))
    content = json.dumps({"findings": [asdict(finding) for finding in found]}, indent=1)
    write_whole(place.doctor, (content + "\n").encode())


def _line(finding: Finding) -> str:
    where = f"stage '{finding.stage}': " if finding.stage else ""
    return f"  {where}{finding.text}\n    → {finding.fix}"
