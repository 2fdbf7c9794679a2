"""Peak memory of a stage's tensors, found by running its own code on tensors that have a size but no memory.

A micro-batch runs on scale models (see `scale.py`) of fake tensors, while every storage that is allocated and freed is
counted. What each phase holds at most grows by the same amount with every block of a kind and every row of the loss
head, so two sizes of each tell the whole. Exact for tensors; what an allocator adds is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distilvlm.data import Batch
from distilvlm.losses.objective import Objective
from distilvlm.models import forward, parts
from distilvlm.models.stages import Choosing
from distilvlm.models.vlm import VLM
from distilvlm.recipe.teachers import KeepSpec

from .scale import Lines, Make, depth, lines, scale_model, train_only, trained
from .step import Step, cut_rows, features_like

SLACK = 1.28
"""What glibc's allocator takes for tensors of mixed sizes that come and go, per byte that they have: 1.23 to 1.33 in
runs of 0.1 to 2 GB of them. Tensors above 32 MB, as in larger models, take no more than their size."""

WINDOW = 64 * 1024
"""Bytes that the kernel maps at once where a page of a file is missed (Linux's `fault_around_bytes`)."""

ROWS = (256, 384)
"""Rows of the loss head that are run: the first fills its chunk, so that the difference is what a row adds."""


@dataclass(frozen=True)
class Situation:
    """What decides a stage's memory; `student` and `teacher` are only read and may be without weights."""

    student: VLM  # as the stage trains it: sparse behind an upcycle
    teacher: VLM | None  # that gives targets in every step
    teacher_dtype: torch.dtype
    trains: tuple[str, ...]
    objective: Objective
    batch: Batch  # the largest; with features
    computes_vision: bool  # the tower runs in every step, because features are not kept
    vision_trains: bool
    accumulates: bool  # more than one micro-batch per update
    autocast: torch.dtype | None
    checkpointing: bool
    choosing: Choosing = ("argmax", None)  # of a sparse student's routers
    kept: KeepSpec | None = None  # of a teacher whose targets are read from disk
    split: bool = False  # processes share the student: of its layers no gradient stays whole, of all else each does


Watch = Callable[[Situation, FakeTensorMode, Sequence[int], int, Sequence[int], Batch], dict[str, int]]
"""Runs a micro-batch on so many layers, blocks of the tower and layers of the teacher: phase -> bytes."""


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
        stand_in = _STAND_INS.get(func) if any(isinstance(value, FakeTensor) for value in args) else None
        result = (stand_in or func)(*args, **(kwargs or {}))
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
    optimiser and the batch; gradients of what trains are included, unless an earlier micro-batch has made them, or
    processes split them."""
    return _extrapolated(situation, _watch)


def looking(situation: Situation, teacher: VLM) -> int:
    """Most bytes held while a teacher gives log-probabilities to the answers of a micro-batch of preferences, or hidden
    rows to be kept, beyond weights and the batch."""
    alone = replace(situation, student=teacher, teacher=None, vision_trains=False)
    return max(_extrapolated(alone, _watch_looking).values())


def _extrapolated(situation: Situation, watch: Watch) -> dict[str, int]:
    blocks = depth(situation.student)[1]
    # Not from one block: what comes and goes between two has its most only where there are two.
    students = lines(situation.student, 2)
    teachers: Lines = [([], 1.0)]
    if situation.teacher is not None:
        teachers = lines(situation.teacher, 2) if situation.kept is None else [([0], 1.0)]  # which does not run
    batch = situation.batch
    rows = max(1, situation.objective.rows(batch.response_rows, batch.visual_rows).numel())
    few = min(1.0, 8 / rows)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def at(
        share: float, student: list[int] = students[0][0], vision: int = 1, teacher: list[int] = teachers[0][0]
    ) -> dict[str, int]:
        return watch(situation, mode, student, vision, teacher, cut_rows(batch, share))

    small = at(few)
    wide = at(few, vision=2) if situation.computes_vision or situation.vision_trains else small
    shares = [min(1.0, count / rows) for count in ROWS]
    full = at(shares[0])
    more = at(shares[1]) if shares[1] > shares[0] else full
    per_row = {n: (more[n] - full[n]) / max(1e-9, (shares[1] - shares[0]) * rows) for n in full}
    found = {
        name: full[name] + (blocks - 1) * (wide[name] - small[name]) + (1 - shares[0]) * rows * per_row[name]
        for name in full
    }
    for further in range(1, max(len(students), len(teachers))):
        ours, theirs = (cut[further] if further < len(cut) else (cut[0][0], 0.0) for cut in (students, teachers))
        tall = at(few, ours[0], 1, theirs[0])
        for name in found:
            found[name] += (theirs if name == "teacher" else ours)[1] * (tall[name] - small[name])
    return {name: round(value) for name, value in found.items()}


def _watch(
    s: Situation, mode: FakeTensorMode, language: Sequence[int], vision: int, teacher: Sequence[int], batch: Batch
) -> dict[str, int]:
    make = fake_maker(mode)
    student = scale_model(s.student, language, vision, make, choosing=s.choosing)
    guide = None if s.teacher is None else scale_model(s.teacher, teacher, 1, make, s.teacher_dtype)
    members = trained(student.model, s.trains)
    train_only(student.model, members)
    student.train()
    if s.checkpointing:
        forward.enable_gradient_checkpointing(student.model)
    layers = [p for layer in forward.layers(student.model) for p in layer.parameters()]
    if s.split and s.autocast is not None:  # gathered so; a cast of each would stay until the backward pass
        for parameter in layers:
            parameter.data = make(parameter.detach().to(s.autocast))
    weights = student.tensors
    if guide is not None:
        parts.freeze(guide.model)
        weights += guide.tensors
    pictures = torch.zeros(0) if batch.features is None else batch.features
    canvas = make(torch.empty(pictures.shape[0], 3, s.student.layout.size, s.student.layout.size, dtype=torch.uint8))
    if batch.features is not None:
        given = {"pictures": canvas, "features": None} if s.vision_trains else {"features": make(batch.features)}
        batch = replace(batch, **given)
    step = Step(student, guide, s.objective, batch, s.autocast, torch.device("cpu"), kept=s.kept)
    grams = step.grams()
    theirs = None if guide is None else features_like(s.batch.teacher or s.batch, guide)
    found: dict[str, int] = {}
    made = layers if s.split else [p for part in members.values() for p in part.values()]
    for parameter in made if s.split or s.accumulates else ():
        if parameter.requires_grad:
            parameter.grad = make(parameter.detach())
            weights.append(parameter.grad)
    live = Live([*weights, *(g for g in grams if g is not None), canvas])
    phase = "vision"

    def mark(name: str) -> None:
        nonlocal phase
        found[phase], phase = live.peak, name
        live.restart()

    with live:
        if s.computes_vision and not s.vision_trains and batch.features is not None:
            step.batch = replace(step.batch, features=step.vision(canvas))
        if theirs is not None and theirs.numel() and (s.vision_trains or theirs.shape != pictures.shape):
            # The teacher's own tower makes its features, without a graph.
            step.teacher_features = make(theirs)
        step.run(grams, mark)
        found[phase] = live.peak
    del step
    return found


def _watch_looking(
    s: Situation, mode: FakeTensorMode, language: Sequence[int], vision: int, _: Sequence[int], batch: Batch
) -> dict[str, int]:
    make = fake_maker(mode)
    teacher = scale_model(s.student, language, vision, make, s.teacher_dtype)
    parts.freeze(teacher.model)
    features = make(features_like(batch, teacher)) if batch.has_pictures else None
    pictures, size = 0 if features is None else features.shape[0], teacher.layout.size
    canvas = make(torch.empty(pictures, 3, size, size, dtype=torch.uint8))
    step = Step(teacher, teacher, s.objective, replace(batch, features=features), s.autocast, torch.device("cpu"))
    with Live([*teacher.tensors, canvas]) as live:
        if s.computes_vision and features is not None:
            step.batch = replace(step.batch, features=step.vision(canvas))
        hidden = step.targets()
        assert hidden is not None
        if s.objective.preference:
            with torch.no_grad(), step.cast():
                step.log_probabilities(hidden, forward.head_weight(teacher.model))
    return {"look": live.peak}


def _grouped(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: object, **__: object) -> Tensor:
    """What products of experts give: torch (2.13) knows their shapes in a GPU's bf16 only.

    a, b: [rows, d] and [groups, d, n], or [d, rows] and [rows, n], whose rows are grouped by `offsets`.
    """
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    assert offsets is not None
    return a.new_empty(offsets.shape[0], a.shape[0], b.shape[1])


def _added(sums: Tensor, dim: int, index: Tensor, values: Tensor, **_: object) -> Tensor:
    """Log-probabilities of answers decide which rows the loss head works on, so they must have values: those of real
    sums stay as they are."""
    return sums if not isinstance(sums, FakeTensor) else torch.ops.aten.index_add_.default(sums, dim, index, values)


def _evenly(chosen: Tensor, _: Tensor | None = None, minlength: int = 0) -> Tensor:
    """How many tokens each expert serves, which decides on shapes: as many each."""
    counts = torch.full((minlength,), chosen.numel() // minlength)
    counts[: chosen.numel() % minlength] += 1
    return counts


_STAND_INS: dict[Any, Any] = {
    torch.ops.aten.bincount.default: _evenly,
    torch.ops.aten._grouped_mm.default: _grouped,
    torch.ops.aten.index_add_.default: _added,
}
"""What fake tensors cannot do, or would lose."""


def parameter_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of all weights and buffers held in `dtype`; shared ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() for t in tensors.values()) * dtype.itemsize


def mapped(reads: int, each: int, whole: int, around: int) -> int:
    """Bytes of a store on disk that stay in memory when so many of its entries were read on a CPU.

    Args:
        each: bytes of an entry.
        whole: bytes of the store.
        around: bytes that are mapped around an entry.
    """
    return min(reads * (each + around), whole)


def count(members: Mapping[str, Mapping[str, nn.Parameter]]) -> int:
    return sum(parameter.numel() for part in members.values() for parameter in part.values())


def fake_maker(mode: FakeTensorMode) -> Make:
    """Makes tensors that have a size but no memory."""

    def make(like: Tensor) -> Tensor:
        with mode:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")

    return make
