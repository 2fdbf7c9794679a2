"""A stage whose language model runs, looked at from all sides."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from distilvlm.data import StageData
from distilvlm.data.problems import RowError
from distilvlm.data.stage import source_of, stage_data
from distilvlm.data.streams import here
from distilvlm.models.features import FeatureError, FeatureReader
from distilvlm.models.quantised import saved_bytes
from distilvlm.models.stages import choosing
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.recipe.teachers import KeepSpec
from distilvlm.teachers.encoders import Shape
from distilvlm.teachers.own_rows import view
from distilvlm.teachers.references import BYTES
from distilvlm.train import objective_of

from . import disk, shapes, timing
from .clock import Clock
from .encoders import Teaching, teaching
from .kept import head_bytes, kept_bytes, seen_before, shown
from .look import Look
from .memory import SLACK, Situation, count, looking, mapped, parameter_bytes, phases
from .meter import available_bytes, machine_bytes
from .network import received
from .numbers import as_bytes
from .result import StageCost
from .scale import trained
from .shapes import Shapes
from .sharing import Sharing, SplitTeacher

PAGES_AROUND = 192 * 1024
"""Bytes that the kernel maps around a picture's kept features when they are read, as seen on Linux 6."""


class LanguageStage:
    """Stage `index` as `student` trains it.

    Args:
        base: bytes of the process without models.
        share: seconds that its pieces may be timed for.
    """

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
        share: float,
    ) -> None:
        self.recipe, self.index, self.spec = recipe, index, recipe.stages[index]
        self.student, self.device, self.world, self.base, self.share = student, device, world, base, share
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
        self.sharing = Sharing(student, self.members, recipe.machine, world, device)
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
                are_here = all(here(self.recipe.data[name].path) for name in names)
                looked[key] = None
                if are_here and self.student.tokenizer is not None:
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
        self._shown = set[int]() if self.data is None else shown(self.recipe, self.index, self.data)
        self.shapes = replace(self.shapes, shown=len(self._shown) or None)

    def cost(self, clock: Clock | None, same: StageCost | None) -> StageCost:
        spec, recipe = self.spec, self.recipe
        flat = {name: parameter for part in self.members.values() for name, parameter in part.items()}
        written = disk.of_stage(recipe, self.index, self.student, flat, self.shapes.total)
        notes = [] if self.shapes.assumed is None else [self.shapes.assumed]
        if self.needs_teacher and self.teacher is None:
            notes.append("memory and time need the teacher, which is not here yet")
            return StageCost(
                spec.name, None, None, written.kept, disk=written.parts, updates=self.shapes.total, notes=tuple(notes)
            )
        if spec.loss.encoder:
            most = self.shapes.largest
            pictures = 0 if most.features is None else most.features.shape[0]
            self.taught = teaching(recipe, spec, self.student, self.encoders, pictures)
            notes += self.taught.notes(self.shapes.pictures)
        parts = self._memory(None if same is None else same.memory.get("working"))
        peak = sum(parts.values())
        look = None
        if spec.loss.preference or (self.kept is not None and self._new_records() != 0):
            look = self._look(clock, same)
        elif self.kept is not None:
            notes.append("an earlier stage has filled the teacher's cache with its records")
        if self.given is not self.kept:
            notes.append("time does not have what the teacher elsewhere takes to answer")
        if look is not None and self.reference is None:
            notes.append("what the teacher's look at the records takes needs the teacher, which is not here yet")
        most = max(peak, (look and look.peak_memory_bytes) or 0)
        notes += self.sharing.notes
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
            if self.world > 1 and seconds is not None:
                notes.append("time does not have what processes send each other")
        return StageCost(
            stage=spec.name,
            peak_memory_bytes=peak,
            seconds_per_update=seconds,
            disk_bytes=written.kept,
            memory=parts,
            time=pieces,
            disk=written.parts,
            updates=self.shapes.total,
            seconds=total,
            look=look,
            waiting=self.sharing.waiting,
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
            split=self.sharing.split,
        )

    def _memory(self, working: int | None) -> dict[str, int]:
        situation, sharing = self._situation(largest=True), self.sharing
        if working is None:
            made = 0 if situation.accumulates or situation.split else 4 * count(self.members)
            working = max(0, max(phases(situation).values()) - made)
        student, *adaptors = sharing.trees
        teacher = 0 if self.teacher is None else self._teacher_bytes(self.teacher, situation.teacher_dtype)
        split = None
        if self.teacher is not None and self.given is not None:
            teacher = head_bytes(self.given, situation)
        elif self.teacher is not None and sharing.split and self.recipe.machine.shard_teacher:
            split = SplitTeacher.of(self.teacher, situation.teacher_dtype, self.world)
            teacher -= split.saved
        parts = {"process": self.base if self.device.type == "cpu" else 0, "student": student, "teacher": teacher}
        if adaptors:
            parts["adaptors"] = sum(adaptors)
        if self.spec.loss.encoder:
            parts["encoders"] = self.taught.held
            working = max(working + self.taught.compared, self.taught.looking)
        beside = sharing.beside(working)
        if split is not None:
            beside["gathered"] = max(beside["gathered"], split.gathered)
        parts |= {"gradients": sharing.gradients, "optimiser": 2 * sharing.gradients, **beside}
        parts |= {"working": working, "data": self._data_bytes(situation) + self._mapped_bytes()}
        if self.device.type == "cpu":
            tensors = 3 * sharing.gradients + sum(beside.values()) + working
            parts["allocator"] = round(tensors * (SLACK - 1))
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
        records, teacher = self._new_records(), self.reference
        kept = None if records is None else BYTES * records
        if self.kept is not None:
            kept = None
            if records is not None and teacher is not None:
                kept = self._kept_bytes(self.kept, records)
                if not any(one.loss.compares for one in self.recipe.stages[: self.index]):
                    kept += head_bytes(self.kept, self._situation(False))
        if teacher is None:
            return Look(records, None, None, kept)
        situation, typical = self._situation(largest=True), self._situation(largest=False)
        head = 0
        if self.kept is not None:
            # Every record is looked at alone, by the teacher's own tower; in the end a micro-batch is, for comparison.
            situation = replace(situation, computes_vision=True)
            typical = replace(typical, batch=self.shapes.record, computes_vision=True)
            head = head_bytes(self.kept, typical)
        working = looking(situation, teacher)
        away = self.sharing.split and self.device.type != "cpu"  # it is brought here when it is split
        peak = sum(
            (
                self.base if self.device.type == "cpu" else 0,
                0 if away else sum(parameter_bytes(tree, torch.float32) for tree in self.student.trees),
                self._teacher_bytes(teacher, situation.teacher_dtype),
                head,
                round(working * (SLACK if self.device.type == "cpu" else 1)),
                self._data_bytes(situation),
            )
        )
        seconds = None
        if clock is not None and records is not None and self._too_large([(teacher, 8)]) is None:
            once = timing.looking(typical, teacher, clock, self.share / 4)
            shown = typical.batch.samples // 2 if self.spec.loss.preference else typical.batch.samples
            seconds = once * -(-records // self.world) / shown
        return Look(records, peak, seconds, kept)

    def _kept_bytes(self, keep: KeepSpec, records: int) -> int:
        return kept_bytes(keep, self._situation(False), self.shapes, records)

    def _records(self) -> int | None:
        """How many different samples the stage shows."""
        if self.data is not None:
            return len(self._shown)
        samples, updates = self.shapes.samples, self.shapes.total
        return samples if samples is None or updates is None else min(samples, updates * self.spec.optim.batch)

    def _new_records(self) -> int | None:
        """How many of these no earlier stage has had kept."""
        earlier = seen_before(self.recipe, self.index) if self.kept is not None else []
        if self.data is None:
            return 0 if earlier else self._records()
        return len(self._shown.difference(*(shown(self.recipe, index, self.data) for index in earlier)))

    def _mapped_bytes(self) -> int:
        """Pages of caches that stay mapped: of the teacher's and of encoders', which are read to the end."""
        records = self._records()
        if self.device.type != "cpu":
            return 0
        found = self.taught.mapped(self.shapes.pictures or 0, self.shapes.pictures or 0)
        if self.kept is not None and self.teacher is not None and records is not None:
            found += self._kept_bytes(self.kept, records)
        return found

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
            return held * (micro_batches + 1) + mapped(pictures, one, self._store_bytes(one), PAGES_AROUND)
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


def _shares_vision(recipe: Recipe, student: VLM, teacher: VLM) -> bool:
    """Whether the student's tower will serve the teacher, as far as can be told without hashing weights."""
    trains = any(name.partition(".")[0] == "vision" for stage in recipe.stages for name in stage.train)
    towers = [vlm.model.model.vision_tower.config.to_diff_dict() for vlm in (student, teacher)]
    return not trains and student.layout == teacher.layout and towers[0] == towers[1]
