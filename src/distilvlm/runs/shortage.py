"""Memory ran out while a stage trained: which part was planned too low, and which settings of `machine:` fit.

The plan's parts stand beside what was there when it happened. What the micro-batch took at that moment is the least
that it takes, so the plan for smaller ones is scaled by how far it was off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distilvlm.cost import as_bytes, estimate
from distilvlm.cost.meter import available_bytes, resident_bytes
from distilvlm.data import StageData
from distilvlm.models.compose import build_student
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec
from distilvlm.recipe.schema import MachineSpec
from distilvlm.train import Loop
from distilvlm.train.parallel import local

SPARE = 0.95
"""Share of the memory that settings may take to be named: estimates are off by some percent."""

HELD = ("student", "teacher", "gradients", "optimiser", "process")
"""Parts that can be told from one another while a stage runs; the rest is what a micro-batch takes, or the process."""

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class MemoryShortageError(RuntimeError):
    """Memory ran out in an update, which was not made; the message says what was planned wrong and what fits."""


@dataclass(frozen=True)
class Room:
    """Memory of the device, in bytes."""

    taken: int  # by this process's tensors at most (CUDA), or by the process
    limit: int | None  # that this process can have
    strange: int  # of other programs, and of CUDA itself


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory: of a device, of Python, or of torch's allocator on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def room(device: torch.device) -> Room:
    """What is taken and left of a device's memory."""
    if device.type != "cuda":
        taken, free = resident_bytes(), available_bytes()
        return Room(taken, None if free is None else taken + free, 0)
    free, total = torch.cuda.mem_get_info(device)
    strange = total - free - torch.cuda.memory_reserved(device)
    return Room(torch.cuda.max_memory_allocated(device), total - strange, strange)


def account(
    error: BaseException,
    loop: Loop,
    vlm: Any,
    teacher: Any,
    data: StageData,
    recipe: Recipe,
    stage: StageSpec,
    world: int,
) -> MemoryShortageError:
    """The error, with all that can be said about it.

    Args:
        vlm, teacher: the models as they are in memory.
        world: processes that share an update.
    """
    device = loop.accelerator.device
    batch = loop.now.batch
    shape = "" if batch is None else f" ({batch.samples} samples, {batch.input_ids.numel()} positions)"
    first = next(iter(str(error).splitlines()), type(error).__name__)
    lines = [f"stage '{stage.name}', {loop.now}{shape}: memory of {device} ran out: {first}"]
    try:
        there, held = room(device), _held(loop, vlm, teacher)
        planned = _estimated(recipe, stage, data, device, world)
        found = _needed(planned, held, there, _asked(error))
        lines += _table(planned, found, there)
        lines += _fitting(planned, found, there, data, recipe, stage, device, world)
    except (ValueError, RuntimeError, MemoryError) as second:  # what was wrong at first must be told in any case
        lines.append(f"  what fits is not known: {type(second).__name__}: {second}")
    lines.append(
        "→ settings of machine: may change in a run: the same command with --set continues it. What else takes less: "
        "docs/scale-out.md, 'Less memory'"
    )
    return MemoryShortageError("\n".join(lines))


def _held(loop: Loop, vlm: Any, teacher: Any) -> dict[str, int]:
    gradients = [p.grad for p in loop.task.parameters() if p.grad is not None]
    state = [v for one in loop.optimizer.state.values() for v in one.values() if isinstance(v, Tensor)]
    theirs = [] if teacher is None else teacher.tensors
    device = loop.accelerator.device
    kinds = (vlm.tensors, theirs, gradients, state, [])
    return {name: _bytes(map(local, kind), device) for name, kind in zip(HELD, kinds, strict=True)}


def _bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Those on the device: rows may wait in the CPU's memory."""
    there = [one.untyped_storage() for one in tensors if one.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in there}.values())


def _estimated(
    recipe: Recipe, stage: StageSpec, data: StageData, device: torch.device, world: int
) -> Mapping[str, int]:
    student = build_student(recipe.student, recipe.seed, meta=True)
    teacher = None if recipe.teacher is None else build_student(recipe.teacher, recipe.seed, meta=True)
    assert teacher is None or isinstance(teacher, VLM)  # the schema refuses others
    (cost,) = estimate(
        recipe,
        student,
        teacher,
        data={stage.name: data},
        device=device,
        world=world,
        measure=False,
        stages=[stage.name],
    )
    if cost.peak_memory_bytes is None:
        raise ValueError("; ".join(cost.notes))
    return cost.memory


def _asked(error: BaseException) -> int:
    """Bytes that were not to be had, as far as the message tells."""
    found = re.search(r"allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error))
    return 0 if found is None else round(float(found[1]) * UNITS[found[2]])


def _working(parts: Mapping[str, int]) -> int:
    return sum(parts.values()) - sum(parts.get(name, 0) for name in HELD)


def _needed(planned: Mapping[str, int], held: Mapping[str, int], there: Room, asked: int) -> dict[str, int]:
    """What each part takes at least: gradients and moments may not have been made yet, and of the process itself (on a
    CPU) only the plan tells."""
    found = {name: max(held[name], planned.get(name, 0) if name in HELD[2:] else 0) for name in HELD}
    held = {**held, "process": found["process"]}
    return {**found, "micro-batch": max(0, there.taken - sum(held.values())) + asked}


def _table(planned: Mapping[str, int], found: Mapping[str, int], there: Room) -> list[str]:
    expected = {**{name: planned.get(name, 0) for name in HELD}, "micro-batch": _working(planned)}
    lines = [f"  {'':12} {'planned':>10} {'at least':>10}"]
    lines += [f"  {name:12} {as_bytes(expected[name]):>10} {as_bytes(found[name]):>10}" for name in found]
    over = {name: found[name] - expected[name] for name in found}
    worst = max(over, key=lambda name: over[name])
    whole, limit = sum(planned.values()), there.limit
    if over[worst] > 0.05 * max(1, expected[worst]):
        lines.append(f"  planned too low: {worst}, by {as_bytes(over[worst])}")
    elif limit is not None and whole > limit:
        lines.append(f"  the plan had said so: {as_bytes(whole)} are needed, {as_bytes(limit)} can be had")
    if there.strange:
        lines.append(f"  not of this process, or CUDA's own: {as_bytes(there.strange)} of this card")
    return lines


def _fitting(
    planned: Mapping[str, int],
    found: Mapping[str, int],
    there: Room,
    data: StageData,
    recipe: Recipe,
    stage: StageSpec,
    device: torch.device,
    world: int,
) -> list[str]:
    if there.limit is None:
        return ["  what fits is not known: this system does not tell how much memory there is"]
    off = max(1.0, found["micro-batch"] / max(1, _working(planned)))
    fixed = sum(found[name] for name in HELD)
    lines: list[str] = []
    for settings in _smaller(recipe.machine, stage):
        for changes in settings:
            changed = recipe.model_copy(update={"machine": recipe.machine.model_copy(update=changes)})
            try:
                parts = _estimated(changed, stage, data, device, world)
            except ValueError:  # a sample is longer than so many positions
                break
            needs = fixed + off * _working(parts)
            if needs <= SPARE * there.limit:
                told = " ".join(f"--set machine.{name}={str(value).lower()}" for name, value in changes.items())
                lines.append(f"  fits: {told} ({as_bytes(round(needs))} of {as_bytes(there.limit)})")
                break
    scaled = f", {off:.1f} times what is planned for a micro-batch" if off > 1 else ""
    return lines or [f"  no smaller micro-batch fits{scaled}, nor one with machine.gradient_checkpointing"]


def _smaller(machine: MachineSpec, stage: StageSpec) -> Iterator[list[dict[str, Any]]]:
    """Settings that take less, the quickest first; of each list the first that fits is as good as it gets."""
    name = "micro_batch" if machine.tokens is None or stage.pictures_alone else "tokens"
    value: int = getattr(machine, name)
    halves = [{name: value >> times} for times in range(1, value.bit_length())]
    yield halves
    if not machine.gradient_checkpointing:
        yield [{"gradient_checkpointing": True}, *({**one, "gradient_checkpointing": True} for one in halves)]
