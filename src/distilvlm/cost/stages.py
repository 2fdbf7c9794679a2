"""What each stage of a recipe will take on this machine: peak memory, seconds per update, bytes on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilvlm.data import StageData
from distilvlm.data.problems import RowError
from distilvlm.data.stage import source_of, stage_data
from distilvlm.models.alone import Encoder
from distilvlm.models.features import FeatureError, FeatureReader
from distilvlm.models.quantised import saved_bytes
from distilvlm.models.stages import choosing, students
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.teachers.encoders import Shape
from distilvlm.teachers.encoders import shapes as encoder_shapes
from distilvlm.teachers.own_rows import view
from distilvlm.teachers.references import BYTES
from distilvlm.train import objective_of

from . import disk, shapes, timing
from .clock import Clock
from .encoders import Teaching, teaching
from .kept import head_bytes, kept_bytes, seen_before
from .look import Look
from .machine import default_device
from .memory import Situation, count, looking, parameter_bytes, phases
from .meter import available_bytes, give_back, machine_bytes, resident_bytes
from .network import received
from .numbers import as_bytes
from .pictures import PictureStage
from .scale import trained, undisturbed
from .shapes import Shapes

BUDGET = 10.0
"""Seconds that an estimate of a whole recipe may time pieces for; counting memory comes on top."""

IMPORTED = resident_bytes()
"""Resident when this module was imported: Python, torch and transformers, before a model was built."""

RUNNING = 40 * 2**20
"""What a run has in memory beyond a process that only plans: accelerate, the data's rows, what loading left behind."""

PAGES_AROUND = 192 * 1024
"""Bytes that the kernel maps around a picture's kept features when they are read, as seen on Linux 6."""

SLACK = 1.28
"""What glibc's allocator takes for tensors of mixed sizes that come and go, per byte that they have: 1.23 to 1.33 in
runs of 0.1 to 2 GB of them. Tensors above 32 MB, as in larger models, take no more than their size."""


@dataclass(frozen=True)
class StageCost:
    """A stage's cost; None where it cannot be known, with the reason in `notes`."""

    stage: str
    peak_memory_bytes: int | None
    seconds_per_update: float | None
    disk_bytes: int | None  # what the stage leaves in the run's directory; the last one with the finished student
    memory: dict[str, int] = field(default_factory=dict)  # what the peak consists of
    time: dict[str, float] = field(default_factory=dict)  # what an update of median size consists of
    disk: dict[str, int] = field(default_factory=dict)  # 'checkpoints' are there only while the stage runs
    updates: int | None = None
    seconds: float | None = None  # the whole stage
    look: Look | None = None  # of a stage of preferences, before it begins
    fits: bool = True  # in the memory of this machine or card
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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
                    one = _Stage(recipe, index, trains, teacher, place, world, base, encoders)
                    one.look(data, looked)
                    one.share = budget / len(chosen)
                    cost = one.cost(clock, known.get(alike))
            except (NotImplementedError, torch.OutOfMemoryError) as error:
                cost = StageCost(stage.name, None, None, None, notes=(f"not estimated: {error}",))
            known.setdefault(alike, cost)
            if missing and stage.loss.encoder:
                cost = replace(cost, notes=(*cost.notes, f"without encoders that are not here: {', '.join(missing)}"))
            costs.append(cost)
    return costs


def _of_pictures(stage: PictureStage, given: Mapping[str, StageData] | None, clock: Clock | None) -> StageCost:
    """The cost of a stage of pictures alone."""
    recipe, spec, student = stage.recipe, stage.recipe.stages[stage.index], stage.student
    data = (given or {}).get(spec.name)
    if data is None and all(Path(recipe.data[name].path).exists() for name in spec.data):
        sources = [source_of(recipe, spec, name) for name in spec.data]
        data = stage_data(recipe, spec, None, student.layout, sources)
    pictures, updates = stage.numbers(data)
    memory, time, taught = stage.measured(data, clock)
    flat = {name: p for part in trained(student.model, spec.train).values() for name, p in part.items()}
    written = _written(recipe, stage.index, student, flat, updates)
    peak, limit = sum(memory.values()), machine_bytes(stage.device)
    notes = [f"needs {as_bytes(peak)}, this machine has {as_bytes(limit)}"] if limit and peak > limit else []
    notes += _cached(taught, pictures)
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
        disk=_on_disk(written),
        updates=updates,
        seconds=None if seconds is None or updates is None else seconds * updates,
        fits=limit is None or peak <= limit,
        notes=tuple(notes),
    )


def _cached(taught: Teaching, pictures: int | None) -> list[str]:
    """What the cache of encoders' features takes, which is not the run's."""
    if taught.cached is None:
        return []
    size = f"{as_bytes(taught.cached)} a picture"
    whole = "" if pictures is None else f", {as_bytes(taught.cached * pictures)} for {pictures:,}"
    return [f"the cache of encoders' features takes {size}{whole}; filling it is not counted (distilvlm cache --plan)"]


def _written(
    recipe: Recipe, index: int, student: VLM | Encoder, flat: Mapping[str, nn.Parameter], updates: int | None
) -> disk.Disk:
    spec = recipe.stages[index]
    return disk.of_stage(
        student,
        flat,
        objective_of(spec, recipe.teacher),
        list(recipe.teachers_of(spec)),
        updates,
        recipe.machine.checkpoint_every,
        recipe.machine.keep,
        last=index == len(recipe.stages) - 1,
    )


def _on_disk(written: disk.Disk) -> dict[str, int]:
    bytes_on_disk = {"trained": written.final, "events": written.events, "checkpoints": written.checkpoints}
    if written.model:
        bytes_on_disk["finished student"] = written.model
    return bytes_on_disk


class _Stage:
    """One stage, looked at from all sides; `student` is as the stage trains it."""

    def __init__(
        self,
        recipe: Recipe,
        index: int,
        student: VLM,
        teacher: VLM | None,
        device: torch.device,
        world: int,
        base: int,
        encoders: Mapping[str, Shape],
    ) -> None:
        self.recipe, self.index, self.spec = recipe, index, recipe.stages[index]
        self.student, self.device, self.world, self.base = student, device, world, base
        # What encoders cost is counted apart.
        self.objective = replace(objective_of(self.spec, recipe.teacher), encoder=0.0, expert_balance=0.0)
        self.encoders, self.taught = encoders, Teaching()
        self.needs_teacher = self.spec.loss.compares
        self.teacher = teacher if self.needs_teacher else None
        how = recipe.teacher
        self.kept = how.keep if how is not None and how.kind == "cached" and self.needs_teacher else None
        # What its targets are like where they are not made here.
        self.given = received(how) if how is not None and how.kind == "remote" and self.needs_teacher else self.kept
        # Looks at the records before the stage: at preferences, or to fill its cache.
        self.reference = teacher if self.spec.loss.preference or self.kept is not None else None
        self.members = trained(student.model, self.spec.train)
        self.vision_trains = any(
            name.startswith("model.vision_tower.") for part in self.members.values() for name in part
        )
        self.share = BUDGET
        self.shapes: Shapes
        self.data: StageData | None

    def look(self, given: Mapping[str, StageData] | None, looked: dict[str, StageData | None]) -> None:
        names = self.spec.data
        if given is not None and self.spec.name in given:
            self.data = given[self.spec.name]
        else:
            beside, spec = None, self.recipe.teacher
            if self.teacher is not None and spec is not None and self.spec.loss.compares:
                beside = view(spec, self.teacher, self.student)
            key = repr((names, self.spec.max_length, beside is None))
            if key not in looked:
                here = all(Path(self.recipe.data[name].path).exists() for name in names)
                looked[key] = None
                if here and self.student.tokenizer is not None:
                    sources = [source_of(self.recipe, self.spec, name) for name in names]
                    student = self.student
                    looked[key] = stage_data(
                        self.recipe, self.spec, student.tokenizer, student.layout, sources, teacher=beside
                    )
            self.data = looked[key]
        rows = [self.recipe.data[name].rows for name in names]
        samples = None if None in rows else sum(row for row in rows if row is not None)
        self.shapes = shapes.of_stage(
            self.recipe, self.index, self.objective, self.student, self.data, samples, self.world
        )

    def cost(self, clock: Clock | None, same: StageCost | None) -> StageCost:
        spec, recipe = self.spec, self.recipe
        flat = {name: parameter for part in self.members.values() for name, parameter in part.items()}
        written = _written(recipe, self.index, self.student, flat, self.shapes.total)
        bytes_on_disk = _on_disk(written)
        notes = [] if self.shapes.assumed is None else [self.shapes.assumed]
        if self.needs_teacher and self.teacher is None:
            notes.append("memory and time need the teacher, which is not here yet")
            return StageCost(
                spec.name, None, None, written.kept, disk=bytes_on_disk, updates=self.shapes.total, notes=tuple(notes)
            )
        if spec.loss.encoder:
            most = self.shapes.largest
            pictures = 0 if most.features is None else most.features.shape[0]
            self.taught = teaching(recipe, spec, self.student, self.encoders, pictures)
            notes += _cached(self.taught, self.shapes.pictures)
        parts = self._memory(None if same is None else same.memory.get("working"))
        peak = sum(parts.values())
        look = None
        if spec.loss.preference or (self.kept is not None and not seen_before(recipe, self.index)):
            look = self._look(clock, same)
        elif self.kept is not None:
            notes.append("an earlier stage has filled the teacher's cache with its records")
        if self.given is not self.kept:
            notes.append("time does not have what the teacher elsewhere takes to answer")
        if look is not None and self.reference is None:
            notes.append("what the teacher's look at the records takes needs the teacher, which is not here yet")
        most = max(peak, (look and look.peak_memory_bytes) or 0)
        limit = machine_bytes(self.device)
        fits = limit is None or most <= limit
        if not fits and limit is not None:
            who = "" if most == peak else "the teacher's look at the records "
            notes.append(f"{who}needs {as_bytes(most)}, this machine has {as_bytes(limit)}")
        seconds = total = None
        pieces: dict[str, float] = {}
        if clock is not None:
            if same is not None and same.time:
                pieces, seconds = same.time, same.seconds_per_update
                mean = (same.seconds or 0.0) / max(1, same.updates or 1)
                total = mean * self.shapes.total if self.shapes.total and same.seconds else None
            elif reason := self._too_large([(self.student, 16), (self.teacher, 8)]):
                notes.append(reason)
            else:
                pieces, seconds, mean, how = self._time(clock)
                total = None if self.shapes.total is None else mean * self.shapes.total
                notes.append(how)
        return StageCost(
            stage=spec.name,
            peak_memory_bytes=peak,
            seconds_per_update=seconds,
            disk_bytes=written.kept,
            memory=parts,
            time=pieces,
            disk=bytes_on_disk,
            updates=self.shapes.total,
            seconds=total,
            look=look,
            fits=fits,
            notes=tuple(notes),
        )

    def _situation(self, largest: bool) -> Situation:
        spec, precision = self.recipe.teacher, self.recipe.machine.precision
        half = spec is not None and spec.held == "bf16"
        return Situation(
            student=self.student,
            teacher=self.teacher,
            teacher_dtype=torch.bfloat16 if half else torch.float32,
            trains=tuple(self.spec.train),
            objective=self.objective,
            batch=self.shapes.largest if largest else self.shapes.typical,
            computes_vision=self.recipe.pictures.features is None,
            vision_trains=self.vision_trains,
            accumulates=len(self.shapes.updates[0]) > 1,
            autocast=torch.bfloat16 if precision == "bf16" else None,
            checkpointing=self.recipe.machine.gradient_checkpointing,
            choosing=choosing(self.recipe, self.spec),
            kept=self.given,
        )

    def _memory(self, working: int | None) -> dict[str, int]:
        situation = self._situation(largest=True)
        gradients = 4 * count(self.members)
        if working is None:
            working = max(0, max(phases(situation).values()) - (0 if situation.accumulates else gradients))
        student = parameter_bytes(self.student.model, torch.float32)
        adaptors = sum(parameter_bytes(tree, torch.float32) for tree in self.student.trees[1:])
        teacher = 0 if self.teacher is None else self._teacher_bytes(self.teacher, situation.teacher_dtype)
        if self.teacher is not None and self.given is not None:
            teacher = head_bytes(self.given, situation)
        parts = {"process": self.base if self.device.type == "cpu" else 0, "student": student, "teacher": teacher}
        if adaptors:
            parts["adaptors"] = adaptors
        if self.spec.loss.encoder:
            parts["encoders"] = self.taught.held
            working = max(working + self.taught.compared, self.taught.looking)
        parts |= {"gradients": gradients, "optimiser": 2 * gradients}
        parts |= {"working": working, "data": self._data_bytes(situation)}
        if self.device.type == "cpu":
            parts["allocator"] = round((3 * gradients + working) * (SLACK - 1))
        return parts

    def _teacher_bytes(self, teacher: VLM, dtype: torch.dtype) -> int:
        spec, held = self.recipe.teacher, sum(parameter_bytes(tree, dtype) for tree in teacher.trees)
        if spec is not None and spec.bits is not None:
            held -= saved_bytes(teacher, spec.bits)
        # On a CPU the tower's share of a whole checkpoint stays mapped with the rest of its file.
        mapped = self.device.type == "cpu" and spec is not None and spec.source is not None
        if _shares_vision(self.recipe, self.student, teacher) and not mapped:
            held -= parameter_bytes(teacher.model.model.vision_tower, dtype)
        return held

    def _look(self, clock: Clock | None, same: StageCost | None) -> Look:
        """The teacher's look at the records that the stage shows, by one process of those that share it."""
        if same is not None and same.look is not None:
            return same.look
        records, teacher = self.shapes.samples, self.reference
        if records is not None and self.shapes.total is not None:
            records = min(records, self.shapes.total * self.spec.optim.batch)
        kept = None if records is None else BYTES * records
        if self.kept is not None:
            kept = None
            if records is not None and teacher is not None:
                kept = kept_bytes(self.kept, self._situation(False), self.shapes, records)
        if teacher is None:
            return Look(records, None, None, kept)
        situation = self._situation(largest=True)
        working = looking(situation, teacher)
        peak = sum(
            (
                self.base if self.device.type == "cpu" else 0,
                sum(parameter_bytes(tree, torch.float32) for tree in self.student.trees),
                self._teacher_bytes(teacher, situation.teacher_dtype),
                round(working * (SLACK if self.device.type == "cpu" else 1)),
                self._data_bytes(situation),
            )
        )
        seconds = None
        if clock is not None and records is not None and self._too_large([(teacher, 8)]) is None:
            typical = self._situation(largest=False)
            once = timing.looking(typical, teacher, clock, self.share / 4)
            shown = typical.batch.samples // 2 if self.spec.loss.preference else typical.batch.samples
            seconds = once * -(-records // self.world) / shown
        return Look(records, peak, seconds, kept)

    def _data_bytes(self, situation: Situation) -> int:
        """Pictures or features of the micro-batches that are there at once, and the pages of the feature store that
        stay mapped."""
        features = situation.batch.features
        if features is None:
            return 0
        # The one that is worked on and the next; those that loader processes have ready; for KTO's z0 a whole update.
        micro_batches = len(self.shapes.updates[0]) if situation.objective.agrees else 1
        micro_batches += 2 * self.recipe.machine.workers
        held = features.numel() * 4
        if not situation.computes_vision:
            if self.device.type != "cpu":
                return held
            one = features[0].numel() * 4
            pictures = self.shapes.pictures or 0
            return held * (micro_batches + 1) + min(pictures * (one + PAGES_AROUND), self._store_bytes(one))
        canvases = features.shape[0] * 3 * self.student.layout.size**2
        return held + canvases * (1 if self.device.type != "cpu" else micro_batches + 1)

    def _store_bytes(self, one: int) -> int:
        """Size of the feature store: as it is, or when it holds this stage's pictures."""
        place = Path(self.recipe.pictures.features or "") / "shards"
        there = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        return max(there, one * (self.shapes.pictures or 0))

    def _too_large(self, models: Sequence[tuple[VLM | None, int]]) -> str | None:
        """Why scale models of these, with so many bytes per parameter, cannot be timed here."""
        scale = sum(each * timing.largest_cut(vlm) for vlm, each in models if vlm is not None)
        free = available_bytes() if self.device.type == "cpu" else torch.cuda.mem_get_info(self.device)[0]
        if free is None or scale <= 0.8 * free:
            return None
        return f"time is not measured: a few layers and the vocabulary need {scale / 1e9:.0f} GB, which are not free"

    def _time(self, clock: Clock) -> tuple[dict[str, float], float, float, str]:
        found = timing.seconds(self._situation(largest=False), self.spec.optim, clock, self.share)
        per_update = [found.update(update) for update in self.shapes.updates]
        reading = self._reading(clock)
        mean, median = (value + reading for value in shapes.mean_and_median(per_update))
        # The pieces of an update of median size: bodies and head in the proportion of the typical micro-batch.
        pieces = {"vision": found.vision, "teacher": found.teacher, "student": found.student, "loss head": found.head}
        if found.before:
            pieces["for z0"] = found.before
        scale = (median - reading - found.optimiser) / max(1e-12, sum(pieces.values()))
        pieces = {name: value * scale for name, value in pieces.items()}
        pieces |= {"optimiser": found.optimiser, "data": reading}
        if self.taught.operations:
            typical = self.shapes.typical.features
            shown = 0 if typical is None else typical.shape[0] * len(self.shapes.updates[0])
            pieces["encoders"] = shown * self.taught.operations / clock.flops(torch.float32)
            mean, median = mean + pieces["encoders"], median + pieces["encoders"]
        return pieces, median, mean, found.measured

    def _reading(self, clock: Clock) -> float:
        """Seconds to encode an update's samples and read their features; loader processes do it beside the device."""
        if self.data is None or self.recipe.machine.workers:
            return 0.0
        data, own = self.data, -(-self.spec.optim.batch // self.world)
        indices = list(range(min(len(data), own, 16)))
        store = self.recipe.pictures.features
        kept = FeatureReader(Path(store)) if store is not None and Path(store).is_dir() else None

        def fetch() -> None:
            for index in indices:
                with contextlib.suppress(RowError):  # the run's own check names it
                    data.beside(index, data.sequences(index)[0])
                for path in data.record(index).images if kept is not None else ():
                    if kept is not None and path in kept:
                        kept(path).clone()

        try:
            return clock.time(fetch, 0.05) * own / len(indices)
        except FeatureError:  # the store is not filled to the end
            return 0.0


def _here(vlm: VLM | Encoder) -> int:
    """Bytes of the weights that are in this process's memory."""
    return sum(t.numel() * t.element_size() for t in vlm.tensors if t.device.type == "cpu")


def _shares_vision(recipe: Recipe, student: VLM, teacher: VLM) -> bool:
    """Whether the student's tower will serve the teacher, as far as can be told without hashing weights."""
    trains = any(name.partition(".")[0] == "vision" for stage in recipe.stages for name in stage.train)
    towers = [vlm.model.model.vision_tower.config.to_diff_dict() for vlm in (student, teacher)]
    return not trains and student.layout == teacher.layout and towers[0] == towers[1]
