"""What each stage of a recipe will take on this machine: peak memory, seconds per update, bytes on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from distilvlm.data import StageData
from distilvlm.data.stage import source_of, stage_data
from distilvlm.data.streams import here
from distilvlm.models.alone import Encoder
from distilvlm.models.stages import students
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.teachers.encoders import shapes as encoder_shapes

from . import disk
from .clock import Clock
from .language import LanguageStage
from .machine import default_device
from .memory import SLACK
from .meter import give_back, machine_bytes, resident_bytes
from .numbers import as_bytes
from .pictures import PictureStage
from .result import StageCost
from .scale import trained, undisturbed
from .sharing import Sharing

BUDGET = 10.0
"""Seconds that an estimate of a whole recipe may time pieces for; counting memory comes on top."""

IMPORTED = resident_bytes()
"""Resident when this module was imported: Python, torch and transformers, before a model was built."""

RUNNING = 40 * 2**20
"""What a run has in memory beyond a process that only plans: accelerate, the data's rows, what loading left behind."""


def estimate(
    recipe: Recipe,
    student: VLM | Encoder,
    teacher: VLM | None,
    *,
    data: Mapping[str, StageData] | None = None,
    device: torch.device | str | None = None,
    world: int = 1,
    budget: float = BUDGET,
    measure: bool = True,
    stages: Sequence[str] | None = None,
) -> list[StageCost]:
    """Estimate every stage without training, loading or drawing anything; models may be on the meta device.

    Args:
        recipe: what will be run.
        student, teacher: only read; the student as the first stage finds it. A missing teacher leaves the stages that
            need one without memory and time.
        data: stage name -> its data, where that is at hand; otherwise read, or assumed where the files are not here.
        device: where the run trains; default: the one it would choose.
        world: processes that share every update.
        budget: seconds to spend on timing; more pieces are extrapolated when it is small.
        measure: False leaves time out.
        stages: only these, by name; default: all.

    Raises:
        DataError, ValueError: as the run itself would, for data or parts that cannot be used.
    """
    place = torch.device(device) if device is not None else default_device()
    give_back()
    here = _here(student) + (0 if teacher is None else _here(teacher))
    base = max(IMPORTED, resident_bytes() - here) + (0 if here else RUNNING)
    chosen = [stage for stage in recipe.stages if stages is None or stage.name in stages]
    costs: list[StageCost] = []
    known: dict[str, StageCost] = {}
    looked: dict[str, StageData | None] = {}
    trained_as = students(recipe, student)
    missing: dict[str, str] = {}
    encoders = encoder_shapes(recipe, student, missing)
    with undisturbed(place):
        clock = Clock(place, budget) if measure else None
        for index, stage in enumerate(recipe.stages):
            if stage not in chosen:
                continue
            # Stages that differ in their name and length only cost the same per update.
            facts = (stage.train, stage.loss, stage.data, stage.order, stage.optim.batch, stage.max_length)
            alike = repr((*facts, stage.reference, stage.encoder)) + f" {id(trained_as[stage.name])}"
            trains = trained_as[stage.name]
            try:
                if stage.pictures_alone or isinstance(trains, Encoder):
                    of_pictures = PictureStage(recipe, index, trains, encoders, place, world, base, SLACK)
                    cost = _of_pictures(of_pictures, data, clock)
                else:
                    share = budget / len(chosen)
                    one = LanguageStage(recipe, index, trains, teacher, place, world, base, encoders, share)
                    one.look(data, looked)
                    cost = one.cost(clock, known.get(alike))
            except (NotImplementedError, torch.OutOfMemoryError) as error:
                cost = StageCost(stage.name, None, None, None, notes=(f"not estimated: {error}",))
            known.setdefault(alike, cost)
            if missing and stage.loss.encoder:
                cost = replace(cost, notes=(*cost.notes, f"without encoders that are not here: {', '.join(missing)}"))
            costs.append(cost)
            # Models with adaptors refer to themselves: what was timed of them would stay while the stage runs.
            give_back()
    return costs


def _of_pictures(stage: PictureStage, given: Mapping[str, StageData] | None, clock: Clock | None) -> StageCost:
    """The cost of a stage of pictures alone."""
    recipe, spec, student = stage.recipe, stage.recipe.stages[stage.index], stage.student
    data = (given or {}).get(spec.name)
    if data is None and all(here(recipe.data[name].path) for name in spec.data):
        sources = [source_of(recipe, spec, name) for name in spec.data]
        data = stage_data(recipe, spec, None, student.layout, sources)
    pictures, updates = stage.numbers(data)
    memory, time, taught = stage.measured(data, clock)
    members = trained(student.model, spec.train)
    sharing = Sharing(student, members, recipe.machine, stage.world, stage.device)
    flat = {name: p for part in members.values() for name, p in part.items()}
    written = disk.of_stage(recipe, stage.index, student, flat, updates)
    peak, limit = sum(memory.values()), machine_bytes(stage.device)
    notes = [f"needs {as_bytes(peak)}, this machine has {as_bytes(limit)}"] if limit and peak > limit else []
    notes += [*sharing.notes, *taught.notes(pictures)]
    seconds = sum(time.values()) if time else None
    if time:
        notes.append("time is counted in multiplications, at the speed of a large product: the least to be expected")
    return StageCost(
        stage=spec.name,
        peak_memory_bytes=peak,
        seconds_per_update=seconds,
        disk_bytes=written.kept,
        memory=memory,
        time=time,
        disk=written.parts,
        updates=updates,
        seconds=None if seconds is None or updates is None else seconds * updates,
        waiting=sharing.waiting,
        fits=limit is None or peak <= limit,
        notes=tuple(notes),
    )


def _here(vlm: VLM | Encoder) -> int:
    """Bytes of the weights that are in this process's memory."""
    return sum(t.numel() * t.element_size() for t in vlm.tensors if t.device.type == "cpu")
