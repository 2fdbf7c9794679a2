"""A run executes a recipe so that it can be killed anywhere and continued with the same command."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from distilvlm.data import export_chat_template
from distilvlm.models import hosted
from distilvlm.models.alone import Encoder
from distilvlm.models.encoder_directory import load_encoder, save_encoder
from distilvlm.models.files import verify
from distilvlm.models.save import load, save
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, load_recipe, read_dump
from distilvlm.teachers import LocalTeacher, Teacher, quantised, require
from distilvlm.teachers.build import open_teacher
from distilvlm.teachers.remote import PromptedTeacher, RemoteTeacher
from distilvlm.train import objective_of, zero
from distilvlm.train.parallel import sharded

from . import about
from .console import CONSOLE, reporter
from .consultation import consult
from .directory import RunDirectory, RunError
from .disk import explained
from .encoders import Encoders, keep_importance, standardise, take_adapters
from .expense import expect
from .lock import locked
from .material import check
from .peers import MARGIN
from .stage import StageRun
from .student import Student
from .teaching import fill_before_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: Path
    model: Path  # the finished student: a stock Hugging Face checkpoint, adaptors over one, or an encoder alone

    def load(self) -> VLM | Encoder:
        """The finished student."""
        recipe = read_dump(RunDirectory(self.directory).recipe.read_text())
        return load_encoder(self.model) if recipe.student.encoder_alone else load(self.model)


def run(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    directory: str | Path | None = None,
) -> Run:
    """Execute a recipe, or continue where an earlier call was stopped; returns at once if nothing is left to do.

    Args:
        recipe: a recipe file, or a loaded recipe.
        overrides: dotted field -> value, or "field=value" strings; applied to a recipe file only.
        directory: the run's directory; default `runs/NAME`.

    Raises:
        RecipeError, RunError, DataError, TeacherError: before the first step, naming what to change.
        DiskError: what the run writes to is full, read-only or broken; at any time.
        Stopped: the process was asked to stop, within `stopping.stoppable()`.
        NonFiniteError, ExplodingError: an update was not made; its batch is kept under `trouble/`.
        MemoryShortageError: with what was planned wrong, and what fits.
        PeerError: another process is gone.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    place = RunDirectory(directory if directory is not None else Path("runs") / recipe.name)
    with explained(recipe, place), _accelerator(recipe, place) as accelerator:
        main = accelerator.is_main_process
        with locked(place.path) if main else contextlib.nullcontext():
            if main:
                place.claim(recipe)
                place.sweep()
            accelerator.wait_for_everyone()
            if not place.finished:
                if main:
                    about.begin(place.about, accelerator.num_processes)
                if recipe.machine.trackers:
                    accelerator.init_trackers(recipe.name, config={"recipe": str(place.recipe)})
                _execute(recipe, place, accelerator)
            elif main:
                logger.info("%s is finished", place.path)
            if main:
                about.end(place.about)
            accelerator.wait_for_everyone()
    return Run(place.path, place.model)


def _execute(recipe: Recipe, place: RunDirectory, accelerator: Accelerator) -> None:
    if recipe.machine.parallel == "deepspeed" and sharded(recipe.machine, accelerator):
        zero.require(recipe.machine, [stage.optim for stage in recipe.stages])
    student = Student(recipe)
    console = reporter(CONSOLE if accelerator.is_main_process else None)
    stages = [StageRun(recipe, i, student, place, accelerator, console) for i in range(len(recipe.stages))]
    left = [run_of_stage for run_of_stage in stages if not run_of_stage.finished]
    teacher: Teacher | None = None
    if recipe.teacher is not None and recipe.teacher.own_rows and any(one.stage.loss.compares for one in left):
        # The data is read with its tokens, too.
        teacher = open_teacher(recipe, _with_language(student), accelerator.device)
    view = None if teacher is None else teacher.view
    material = {one.stage.name: check(recipe, one.stage, student.vlm, place, accelerator, view) for one in left}
    encoders = _encoders(recipe, student, left, accelerator)
    data = {name: rows for name, (rows, _) in material.items()}
    cached = recipe.teacher is not None and recipe.teacher.kind == "cached"
    if cached and any(one.stage.loss.compares for one in left):
        fill_before_run(recipe, _with_language(student), data, accelerator)
    if teacher is None and any(run_of_stage.stage.loss.needs_teacher for run_of_stage in left):
        # Built before the first step even if a later stage is the first to need it: that is when it is refused.
        preferences = any(run_of_stage.stage.loss.preference for run_of_stage in left)
        teacher = open_teacher(recipe, _with_language(student), accelerator.device, preferences)
    for one in left:
        if teacher is not None and one.stage.loss.compares:
            require(teacher, objective_of(one.stage, recipe.teacher).needs, one.stage.name)
    if accelerator.is_main_process and isinstance(teacher, (RemoteTeacher, PromptedTeacher)):
        place.claim_teacher(teacher.identity)
    standardise(recipe, student.vlm.model, encoders, place, accelerator)
    student.vlm.to("cpu" if recipe.machine.offload else accelerator.device)
    if accelerator.is_main_process:
        if encoders is not None:
            keep_importance(recipe, encoders, place)
        consult(recipe, student, teacher, material, place, encoders)
        if isinstance(teacher, LocalTeacher) and recipe.teacher is not None and recipe.teacher.bits is not None:
            apart = quantised.kept(place.quantised, recipe, teacher, data)
            logger.info("%s", quantised.told(recipe.teacher.precision, apart))
        expect(recipe, student.vlm, None if teacher is None else teacher.vlm, data, place, accelerator)
    if sharded(recipe.machine, accelerator):
        student.vlm.to("cpu")  # each stage brings to the device what is this process's
    accelerator.wait_for_everyone()
    del material, data  # each stage reads its data again, with features: what all of them hold at once may be a lot
    with _same_bits_on_cuda(accelerator):
        for run_of_stage in stages:
            if run_of_stage not in left:
                run_of_stage.replay()
                continue
            preferences = bool(run_of_stage.stage.loss.preference)
            if not run_of_stage.stage.loss.needs_teacher or (
                cached and isinstance(teacher, LocalTeacher) != preferences
            ):
                teacher = None  # its memory is of more use to this stage
            if run_of_stage.stage.loss.needs_teacher and teacher is None:
                teacher = open_teacher(recipe, _with_language(student), accelerator.device, preferences)
            if preferences:
                assert isinstance(teacher, (LocalTeacher, RemoteTeacher))  # the schema refuses others
                run_of_stage.consult(teacher)
                teacher = None  # what it thinks of the answers is kept
            if not any(one.stage.loss.encoder for one in left[left.index(run_of_stage) :]):
                encoders = None
            run_of_stage.execute(teacher, encoders if run_of_stage.stage.loss.encoder else None)
            if run_of_stage is not stages[-1]:
                run_of_stage.settle()
    if accelerator.is_main_process:
        take_adapters(student.vlm.model, place)
        _save(recipe, student.vlm, place)
    stages[-1].settle()  # its disk holds the finished student, too


def _save(recipe: Recipe, student: VLM | Encoder, place: RunDirectory) -> None:
    """The finished student, with the template that its last stage of language was taught; what is there is damaged."""
    if place.model.exists():
        logger.warning("%s is damaged (%s): written anew", place.model, "; ".join(verify(place.model, contents=False)))
    student.to("cpu")
    if isinstance(student, Encoder):
        save_encoder(student.model.tower, student.layout, place.model, recipe.pictures.geometry, replace=True)
        logger.info("the finished student: %s", place.model)
        return
    taught = next((stage for stage in reversed(recipe.stages) if not stage.pictures_alone), None)
    kind = None if taught is None else recipe.data[taught.data[-1]].template
    if student.adaptors:
        assert kind is not None  # a stage that trains an adaptor has a term of language
        hosted.save(student, recipe.student, recipe.seed, place.model, recipe.pictures.geometry, kind, replace=True)
    else:
        template = None if kind is None else export_chat_template(kind, student.tokenizer)
        save(student, place.model, recipe.pictures.geometry, template, replace=True)
    logger.info("the finished student: %s", place.model)


def _with_language(student: Student) -> VLM:
    assert isinstance(student.vlm, VLM)  # the schema refuses a teacher for an encoder alone
    return student.vlm


def _encoders(recipe: Recipe, student: Student, left: Sequence[StageRun], accelerator: Accelerator) -> Encoders | None:
    """The encoders of the stages that are left, if one of them needs any: while the student has its initial weights,
    which the anchor keeps."""
    stages = [one.stage for one in left if one.stage.loss.encoder]
    return Encoders(recipe, student.vlm, student.shapes, stages, accelerator) if stages else None


@contextlib.contextmanager
def _accelerator(recipe: Recipe, place: RunDirectory) -> Iterator[Accelerator]:
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("1", "true", "yes"):
            raise RunError(
                f"accelerate was told to use {engine}, which would not know what a run saves. How processes share a "
                "student is the recipe's machine.parallel: launch with a plain configuration (accelerate launch "
                "--multi_gpu), and set machine.parallel=fsdp to split it"
            )
    # accelerate keeps its state for the life of the process; the next run may want another precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        # Without this, accelerate runs a `torchrun` on a machine without a GPU as so many unrelated main processes.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if recipe.machine.precision == "bf16" else "no",
        log_with=list(recipe.machine.trackers) or None,
        project_dir=str(place.trackers),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.machine.timeout + MARGIN))],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RunError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}: they would all "
            "write into one run directory. Launch with `torchrun` or `accelerate launch`"
        )
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.free_memory()


@contextlib.contextmanager
def _same_bits_on_cuda(accelerator: Accelerator) -> Iterator[None]:
    """Same recipe, same machine → same weights: CUDA must choose its deterministic kernels for that."""
    if accelerator.device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
