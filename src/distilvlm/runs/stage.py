"""One stage of a run: prepare, continue from the last whole checkpoint, train, write checkpoints, finish."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from distilvlm.cost import Meter
from distilvlm.data import Batch, Grouping, MicroBatches, batches
from distilvlm.data.alignment import TeacherView
from distilvlm.models import forward, packing, parts
from distilvlm.models.alone import Encoder
from distilvlm.models.files import remove, verify
from distilvlm.models.fingerprint import fingerprint
from distilvlm.recipe import Recipe
from distilvlm.teachers import LocalTeacher, References, Teacher
from distilvlm.teachers.remote import RemoteTeacher
from distilvlm.train import Loop, Task, Update, UpdateError, objective_of
from distilvlm.train.encoders import Comparison
from distilvlm.train.optim import adamw
from distilvlm.train.parallel import Parallel, Sharded, shard_teacher, sharded
from distilvlm.train.zero import Zero

from . import about, checkpoint, randomness, shortage, stopping
from .checkpoint import Position
from .console import Reporter
from .directory import RunDirectory, RunError
from .disk import require_room
from .encoders import Encoders, standardise
from .events import Events
from .expense import settle
from .material import Material, prepare, quarantine
from .peers import Peers
from .student import Student
from .trouble import account, refuse_again

logger = logging.getLogger(__name__)


class StageRun:
    """Stage `index` of a run."""

    def __init__(
        self,
        recipe: Recipe,
        index: int,
        student: Student,
        place: RunDirectory,
        accelerator: Accelerator,
        reporter: Reporter,
    ) -> None:
        self.recipe, self.index, self.stage = recipe, index, recipe.stages[index]
        self.student, self.place, self.accelerator, self.reporter = student, place, accelerator, reporter
        self.checkpoints = place.checkpoints(index, self.stage.name)
        self.final = place.final(index, self.stage.name)
        self.meter = Meter(accelerator.device, place.path)
        self._grouping = Grouping.of(recipe.machine, self.stage)
        self.executed: Literal["not", "in part", "whole"] = "not"  # in this process
        self._prepared: Material | None = None

    @property
    def finished(self) -> bool:
        if not self.final.exists():
            return False
        if problems := verify(self.final):
            raise RunError(
                f"the finished stage '{self.stage.name}' is damaged: {'; '.join(problems)}. Restore {self.final}, or "
                f"remove {self.final.parent} and those of later stages to train it again"
            )
        return True

    def replay(self) -> None:
        """Bring the student to where this finished stage left it."""
        self.student.replay(self.stage, self.final)

    def consult(self, teacher: LocalTeacher | RemoteTeacher) -> None:
        """Ask the teacher for all that a preference stage needs of it, which is not needed any more after that."""
        material = self._material()
        data, order = material.data, material.order
        shown = {index for number in range(material.updates) for _, index in order.update(number)}
        references = References(self.place.references, teacher, self.recipe.machine.precision)
        with self.accelerator.autocast():
            found = references.fill(
                data,
                self._grouping,
                self.accelerator.process_index,
                self.accelerator.num_processes,
                self.accelerator.wait_for_everyone,
                shown,
            )
        data.reference_reader = found.__getitem__

    def _material(self, encoders: Encoders | None = None, view: TeacherView | None = None) -> Material:
        if self._prepared is None:
            place, accelerator = self.place, self.accelerator
            self._prepared = prepare(self.recipe, self.index, self.student.vlm, place, accelerator, encoders, view)
        return self._prepared

    def execute(self, teacher: Teacher | None, encoders: Encoders | None = None) -> None:
        """Train the stage, or what is left of it.

        Args:
            encoders: where the stage compares with encoders.

        Raises:
            UpdateError, MemoryShortageError, PeerError: something went wrong; all that could be found out about it.
        """
        logger.info("stage '%s': %d of %d", self.stage.name, self.index + 1, len(self.recipe.stages))
        self.meter.start()
        self.student.transform(self.stage)
        by_part = self.student.choose(self.stage)
        self.parameters: dict[str, Tensor] = {n: p for members in by_part.values() for n, p in members.items()}
        vlm = self.student.vlm
        if self.recipe.machine.gradient_checkpointing:
            forward.enable_gradient_checkpointing(vlm.model)
        split = sharded(self.recipe.machine, self.accelerator)
        if split:  # a tower sees pictures before the rest is brought to the device, row by row
            vlm.model.model.vision_tower.to(self.accelerator.device)
        else:
            vlm.to(self.accelerator.device)
        self._require_packable(teacher)
        material = self._material(encoders, None if teacher is None else teacher.view)
        if self.accelerator.is_main_process:
            file = self.place.stage(self.index, self.stage.name) / "about.json"
            about.stage(file, self.stage, vlm, by_part, material.report, material.updates)
        base = fingerprint(vlm.model, self.parameters.keys(), parts.beside(vlm.model))
        objective = objective_of(self.stage, self.recipe.teacher)
        comparison = None if encoders is None else Comparison(self.recipe, self.stage, self.student.shapes)
        theirs = None if teacher is None or teacher.vlm is None else forward.head_weight(teacher.vlm.model).shape[0]
        head = None if teacher is None else teacher.head
        task = Task(vlm, objective, head, comparison, theirs, self.accelerator.device)
        parallel: Parallel | None = None
        zero: Zero | None = None
        if split and self.recipe.machine.parallel == "deepspeed":
            parallel = zero = Zero(self.accelerator, task, self.recipe.machine, self.stage.optim, by_part)
            self.optimizer, self.moments = zero.optimizer, zero.moments
            self.parameters = zero.held
        elif split:
            parallel = Sharded(self.accelerator, task, self.recipe.machine)
            rows = parts.named(vlm.model)  # this process's of each
            by_part = {part: {name: rows[name] for name in members} for part, members in by_part.items()}
            del rows
            if self.recipe.machine.shard_teacher and isinstance(teacher, LocalTeacher):
                shard_teacher(teacher.vlm, self.accelerator)
        if zero is None:
            self.optimizer = self.moments = adamw(by_part, self.stage.optim)
            self.parameters = {name: p for members in by_part.values() for name, p in members.items()}
        position = self._continue(base)
        if zero is not None:
            zero.take()
        saves = material.updates - position.update > self.recipe.machine.checkpoint_every
        self._require_room(self.checkpoints if saves else self.final, moments=saves)  # better now than after hours
        refuse_again(self.recipe, self.stage, position.update, self.place, self.accelerator.num_processes)
        loop = Loop(
            self.accelerator,
            task,
            self.optimizer,
            teacher,
            self.stage.optim,
            material.updates,
            self._grouping,
            None if encoders is None else lambda batch: encoders.see(batch, self.stage),
            self.stage.loss.schedule,
            stopping.asked,
            parallel,
            self.recipe.machine.explosion,
        )
        with stopping.deferred(), self._events(position) as events, self._told(loop, material, teacher):
            if events is not None and not position.update and (share := material.report.aligned) is not None:
                learned, paired = material.report.learned, material.report.paired
                events.write("alignment", stage=self.stage.name, share=share, paired=paired, learned=learned)
            self._train(loop, material, position, events)
            self._finish(material.updates, position.base, events)
            self._stop_if_asked(loop, "finished")
        self.meter.stop()
        self.executed = "in part" if position.update else "whole"
        self.student.mark_trained(set(self.parameters))
        self._prepared = None
        if zero is not None:
            zero.close()
        del parallel, zero, task, loop
        # Moments and gradients of what this stage trained would stay through all later ones, and feed-forwards of which
        # a later one makes experts: gigabytes.
        del self.optimizer, self.moments, self.parameters
        for tree in vlm.trees:
            tree.zero_grad(set_to_none=True)
        self.accelerator.free_memory()
        if split:
            del vlm, by_part
            self._whole_again()

    def _whole_again(self) -> None:
        """The student whole in every process, which a transform or its reader wants: as a continued run has it."""
        done = self.recipe.stages[: self.index + 1]
        self.student.again([(stage, self.place.final(index, stage.name)) for index, stage in enumerate(done)])
        standardise(self.recipe, self.student.vlm.model, None, self.place, self.accelerator)

    def _require_packable(self, teacher: Teacher | None) -> None:
        """Raises ValueError where samples can't share a row."""
        machine = self.recipe.machine
        if self.stage.pictures_alone and (machine.packing or machine.tokens is not None):
            logger.info("a stage of pictures alone has no text to pack or count: %d per forward", machine.micro_batch)
        if self._grouping.packed:
            assert not isinstance(self.student.vlm, Encoder)  # which only has stages of pictures alone
            packing.require_packable(self.student.vlm, "student")
            if isinstance(teacher, LocalTeacher):
                packing.require_packable(teacher.vlm, "teacher")

    def settle(self) -> None:
        """Note what the stage took, as far as this process saw it."""
        if self.executed == "not" or not self.accelerator.is_main_process:
            return
        measured = self.meter.measured()
        if self.executed == "in part":  # what an earlier process left is not this one's
            measured = replace(measured, disk_bytes=None)
        settle(self.stage.name, measured, self.place)

    def _train(self, loop: Loop, material: Material, position: Position, events: Events | None) -> None:
        every = self.recipe.machine.checkpoint_every
        earlier = sum(position.update for position in self._finished_before())
        self.reporter.begin(self.stage.name, position.update, material.updates)
        try:
            for update in loop.run(self._updates(material, position.update)):
                if events is not None:
                    events.write("update", stage=self.stage.name, **_event(update))
                self._track(update, earlier + update.number)
                self.reporter.update(update)
                self.meter.update(update.seconds)
                if update.number == material.updates:
                    continue
                if update.number % every == 0 or loop.stopping:
                    self._checkpoint(update.number, position.base, events)
                self._stop_if_asked(loop, f"saved behind update {update.number}")
        finally:
            self.reporter.end()

    @contextlib.contextmanager
    def _told(self, loop: Loop, material: Material, teacher: Teacher | None) -> Iterator[None]:
        """What goes wrong within is looked into, and told with what to do about it; the other processes are watched."""
        remote = None if self.recipe.teacher is None else self.recipe.teacher.remote
        patience = self.recipe.machine.timeout + (0.0 if remote is None else remote.patience)
        peers = Peers(self.accelerator, patience, lambda: (loop.now.moves, f"stage '{self.stage.name}', {loop.now}"))
        with peers.watching():
            try:
                yield
            except UpdateError as error:
                told = account(error, loop, material, self.recipe, self.stage, self.place, self.accelerator)
                raise told from error
            except Exception as error:
                if not shortage.ran_out(error):
                    raise
                theirs = None if teacher is None else teacher.vlm
                world = self.accelerator.num_processes
                told = shortage.account(
                    error, loop, self.student.vlm, theirs, material.data, self.recipe, self.stage, world
                )
                raise told from error

    def _stop_if_asked(self, loop: Loop, saved: str) -> None:
        """Raises Stopped on every process, if one of them was asked to stop until the last update."""
        if loop.stopping:
            raise stopping.Stopped(
                f"stopped by {stopping.told()}; stage '{self.stage.name}' is {saved}; the same command continues"
            )

    def _updates(self, material: Material, first: int) -> Iterator[tuple[int, int, MicroBatches]]:
        machine, accelerator = self.recipe.machine, self.accelerator
        stream = batches(
            material.data,
            material.order,
            first,
            material.updates,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            grouping=self._grouping,
            workers=machine.workers,
        )
        for number, micro_batches in stream:
            noted = (self._noted(batch, number) for batch in micro_batches)
            yield number, len(material.order.update(number)), MicroBatches(len(micro_batches), noted)

    def _noted(self, batch: Batch, update: int) -> Batch:
        """The batch, whose rows that can't be used are told and kept."""
        if batch.bad:
            count, first = len(batch.bad), batch.bad[0]
            logger.warning("%d rows can't be used: they count as 0 in update %d; %s", count, update + 1, first)
            quarantine(self.place.quarantine(self.accelerator.process_index), self.stage, batch.bad)
        return batch

    def _continue(self, base: str) -> Position:
        """Load the last whole checkpoint if there is one; returns where to go on."""
        found: list[Path | None] = [None]
        if self.accelerator.is_main_process:
            found[0] = checkpoint.last_whole(self.checkpoints)
            if found[0] is None and any(self.checkpoints.glob("[0-9]*")):
                logger.warning("no whole checkpoint is left: stage '%s' begins anew", self.stage.name)
        broadcast_object_list(found)
        if found[0] is None:
            randomness.seed_stage(self.recipe.seed, self.index, self.accelerator.process_index)
            before = self._finished_before()
            return Position(self.stage.name, 0, before[-1].events if before else 0, base)
        position = checkpoint.read_position(found[0])
        if position.base != base:
            raise RunError(
                f"{found[0]} was made on another base: something that this stage does not train has changed since "
                "(a directory that the recipe's 'from' names, or the installed transformers). Put it back, or start "
                "anew with another --dir"
            )
        states = checkpoint.load(found[0], self.parameters, self.moments)
        logger.info("stage '%s' continues behind update %d", self.stage.name, position.update)
        if not randomness.restore(states, self.accelerator):
            process = self.accelerator.process_index
            randomness.seed_stage(self.recipe.seed, self.index, process, position.update)
            logger.info("another number of processes has made the checkpoint: dropout is drawn anew")
        return position

    def _finished_before(self) -> list[Position]:
        """Where the earlier stages ended."""
        earlier = enumerate(self.recipe.stages[: self.index])
        return [checkpoint.read_position(self.place.final(index, stage.name)) for index, stage in earlier]

    @contextlib.contextmanager
    def _events(self, position: Position) -> Iterator[Events | None]:
        if not self.accelerator.is_main_process:
            yield None
            return
        events = Events(self.place.events, keep=position.events)
        try:
            yield events
        finally:
            events.close()

    def _checkpoint(self, update: int, base: str, events: Events | None) -> None:
        states = randomness.states(self.accelerator)
        position = Position(self.stage.name, update, 0 if events is None else events.sync(), base)
        directory = self.checkpoints / f"{update:08d}"
        if events is not None and directory.exists():  # made before by a run that was killed, damaged, and passed over
            remove(directory)
        self._require_room(directory, moments=True)
        checkpoint.save(directory, position, self.parameters, self.moments, states, self.accelerator)
        if events is not None:
            checkpoint.rotate(self.checkpoints, self.recipe.machine.keep)
        self.accelerator.wait_for_everyone()

    def _finish(self, updates: int, base: str, events: Events | None) -> None:
        if events is not None:
            events.write("stage_finished", stage=self.stage.name)
        position = Position(self.stage.name, updates, 0 if events is None else events.sync(), base)
        self._require_room(self.final, moments=False)
        checkpoint.save(self.final, position, self.parameters, None, {}, self.accelerator)
        if events is not None and self.checkpoints.exists():
            remove(self.checkpoints)
        self.accelerator.wait_for_everyone()

    def _require_room(self, directory: Path, moments: bool) -> None:
        """Raises DiskError where there is none for the stage's weights, with Adam's two moments of each or without."""
        if self.accelerator.is_main_process:
            weights = sum(parameter.numel() * parameter.element_size() for parameter in self.parameters.values())
            require_room(directory, weights * (3 if moments else 1), self.recipe, self.place)

    def _track(self, update: Update, step: int) -> None:
        """`step` counts over all stages: trackers drop what lies behind the last step that they saw."""
        if not self.recipe.machine.trackers:
            return
        values = {"loss": update.loss, "rate": update.rate, "gradient_norm": update.gradient_norm, **update.terms}
        self.accelerator.log({f"{self.stage.name}/{name}": value for name, value in values.items()}, step=step)


def _event(update: Update) -> dict[str, Any]:
    """An update as its event; where nothing is routed or changes, there is nothing to tell of it."""
    values = asdict(update)
    return {name: v for name, v in values.items() if v or name not in ("routing", "vision_routing", "scheduled")}
