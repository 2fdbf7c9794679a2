"""Peak memory of a stage's tensors, found by running its own code on tensors that have a size but no memory.

A micro-batch runs on scale models (see `scale.py`) of fake tensors, while every storage that is allocated and freed is
counted. What each phase holds at most grows by the same amount with every block and every row of the loss head, so two
sizes of each tell the whole. Exact for tensors; what an allocator adds is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distilvlm.data import Batch
from distilvlm.losses.objective import Objective
from distilvlm.models import forward
from distilvlm.models.vlm import VLM

from .scale import Make, depth, scale_model, train_only, trained
from .step import Step, cut_rows

ROWS = (256, 384)
"""Rows of the loss head that are run: the first fills its chunk, so that the difference is what a row adds."""


@dataclass(frozen=True)
class Situation:
    """What decides a stage's memory; `student` and `teacher` are only read and may be without weights."""

    student: VLM
    teacher: VLM | None
    teacher_dtype: torch.dtype
    trains: tuple[str, ...]
    objective: Objective
    batch: Batch  # the largest; with features
    computes_vision: bool  # the tower runs in every step, because features are not kept
    vision_trains: bool
    accumulates: bool  # more than one micro-batch per update
    autocast: torch.dtype | None
    checkpointing: bool


class Live(TorchDispatchMode):
    """Counts the bytes of every storage that operations inside it allocate, until it is freed."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._see(tensor, counts=False)

    def restart(self) -> None:
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, counts=True)
        return result

    def _see(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.bytes -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def phases(situation: Situation) -> dict[str, int]:
    """Most bytes held in each phase of a micro-batch ('vision', 'teacher', 'forward', 'backward'), beyond weights,
    optimiser and the batch; gradients of what trains are included."""
    layers, blocks = depth(situation.student)
    teacher_layers = 0 if situation.teacher is None else depth(situation.teacher)[0]
    batch = situation.batch
    rows = max(1, situation.objective.rows(batch.response_rows, batch.visual_rows).numel())
    few = min(1.0, 8 / rows)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def at(language: int, vision: int, share: float) -> dict[str, int]:
        depths = min(language, layers), min(vision, blocks), min(language, teacher_layers)
        return _watch(situation, mode, *depths, cut_rows(batch, share))

    # Not from one block: what comes and goes between two has its most only where there are two.
    small, tall = at(2, 1, few), at(3, 1, few)
    wide = at(2, 2, few) if situation.computes_vision or situation.vision_trains else small
    shares = [min(1.0, count / rows) for count in ROWS]
    full = at(2, 1, shares[0])
    more = at(2, 1, shares[1]) if shares[1] > shares[0] else full
    per_row = {n: (more[n] - full[n]) / max(1e-9, (shares[1] - shares[0]) * rows) for n in full}
    deeper = {name: teacher_layers if name == "teacher" else layers for name in full}
    return {
        name: round(
            full[name]
            + max(0, deeper[name] - 2) * (tall[name] - small[name])
            + (blocks - 1) * (wide[name] - small[name])
            + (1 - shares[0]) * rows * per_row[name]
        )
        for name in full
    }


def _watch(
    s: Situation, mode: FakeTensorMode, language: int, vision: int, teacher: int, batch: Batch
) -> dict[str, int]:
    make = _fake(mode)
    student = scale_model(s.student, language, vision, make)
    guide = None if s.teacher is None else scale_model(s.teacher, teacher, 1, make, s.teacher_dtype)
    members = trained(student.model, s.trains)
    train_only(student.model, members)
    student.model.train()
    if s.checkpointing:
        forward.enable_gradient_checkpointing(student.model)
    weights = [*student.model.parameters(), *student.model.buffers()]
    if guide is not None:
        guide.model.requires_grad_(False)
        weights += [*guide.model.parameters(), *guide.model.buffers()]
    pictures = torch.zeros(0) if batch.features is None else batch.features
    canvas = make(torch.empty(pictures.shape[0], 3, s.student.layout.size, s.student.layout.size, dtype=torch.uint8))
    if batch.features is not None:
        given = {"pictures": canvas, "features": None} if s.vision_trains else {"features": make(batch.features)}
        batch = replace(batch, **given)
    step = Step(student, guide, s.objective, batch, s.autocast, torch.device("cpu"))
    grams = step.grams()
    found: dict[str, int] = {}
    live = Live([*weights, *(g for g in grams if g is not None), canvas])
    phase = "vision"

    def mark(name: str) -> None:
        nonlocal phase
        found[phase], phase = live.peak, name
        live.restart()

    with live:
        if s.accumulates:
            for parameters in members.values():
                for parameter in parameters.values():
                    parameter.grad = torch.empty_like(parameter)
        if s.computes_vision and not s.vision_trains and batch.features is not None:
            step.batch = replace(step.batch, features=step.vision(canvas))
        if s.vision_trains and guide is not None and batch.pictures is not None:
            # The teacher's own tower makes its features, without a graph.
            step.teacher_features = make(pictures)
        step.run(grams, mark)
        found[phase] = live.peak
    del step
    return found


def parameter_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of all weights and buffers held in `dtype`; shared ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() for t in tensors.values()) * dtype.itemsize


def count(members: Mapping[str, Mapping[str, nn.Parameter]]) -> int:
    return sum(parameter.numel() for part in members.values() for parameter in part.values())


def _fake(mode: FakeTensorMode) -> Make:
    def make(like: Tensor) -> Tensor:
        with mode:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")

    return make
