"""What each stage of a run was expected to take, and what it took: `cost.json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict

from accelerate import Accelerator

from distilvlm.cost import Measured, StageCost, estimate, line, record
from distilvlm.data import StageData
from distilvlm.models.alone import Encoder
from distilvlm.models.files import write_whole
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe

from .directory import RunDirectory, recalled

logger = logging.getLogger(__name__)

BUDGET = 3.0
"""Seconds that timing pieces of the stages may take before a run begins."""


def expect(
    recipe: Recipe,
    student: VLM | Encoder,
    teacher: VLM | None,
    data: Mapping[str, StageData],
    place: RunDirectory,
    accelerator: Accelerator,
) -> None:
    """Estimate every stage, say it and keep it, unless that was done when the run began."""
    if recalled(place.cost) is not None:
        return
    costs = estimate(
        recipe,
        student,
        teacher,
        data=data,
        device=accelerator.device,
        world=accelerator.num_processes,
        budget=BUDGET,
    )
    for cost in costs:
        logger.info("%s", line(cost))
        for note in () if cost.fits else cost.notes:
            logger.warning("stage '%s': %s", cost.stage, note)
    _write(place, record(costs, {}))


def settle(stage: str, measured: Measured, place: RunDirectory) -> None:
    """Note what a stage really took, and say it beside what was expected."""
    content = recalled(place.cost)
    if content is None:  # a run of a version that kept no estimate
        return
    for entry in content["stages"]:
        if entry["stage"] == stage:
            entry["measured"] = asdict(measured)
            logger.info("%s", line(StageCost(stage, **entry["estimate"]), measured))
    _write(place, content)


def _write(place: RunDirectory, content: Mapping[str, object]) -> None:
    write_whole(place.cost, (json.dumps(content, indent=1) + "\n").encode())
