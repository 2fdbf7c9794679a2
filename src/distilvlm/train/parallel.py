"""How processes share the training of a stage: each holds the whole student (DDP), or its part of it (FSDP2; of
moments alone, DeepSpeed's ZeRO: zero.py).

Either way every process takes its share of an update's samples, gradients are averaged over the processes, and what
runs is the task's own forward.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from distilvlm.data import Batch, MicroBatches
from distilvlm.models import forward
from distilvlm.models.alone import Alone
from distilvlm.models.vlm import VLM
from distilvlm.recipe.schema import MachineSpec

from .rows import local
from .task import Task


class Parallel(Protocol):
    """What the loop asks of the processes together. Every method is a collective call."""

    def micro_batches(self, own: Collection[Batch], idle: Batch) -> Collection[Batch]:
        """What this process runs in an update: its own micro-batches, and idle ones where others have more."""
        ...

    def gathering(self) -> contextlib.AbstractContextManager[object]:
        """Around a micro-batch that is not the update's last: gradients are added up and may stay apart."""
        ...

    def forward(self, *arguments: Any) -> dict[str, Any]:
        """The task's forward."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; in the end it is the mean over processes."""
        ...

    def clip(self, parameters: Sequence[Tensor], limit: float) -> float:
        """Scale the gradients of `parameters` so that their norm is `limit` at most; returns what it was."""
        ...

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are none, before an update."""
        ...

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the update."""
        ...


class _Torch:
    """What torch does itself once the gradients are there."""

    accelerator: Accelerator

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()


class Replicated(_Torch):
    """Every process holds the whole task (DDP); also a single process."""

    def __init__(self, accelerator: Accelerator, task: Task) -> None:
        self.accelerator = accelerator
        self._wrapped: nn.Module = accelerator.prepare_model(task)

    def micro_batches(self, own: Collection[Batch], idle: Batch) -> Collection[Batch]:
        return own or [idle]  # who has no sample in this update still joins the others' gradient synchronisation

    def gathering(self) -> contextlib.AbstractContextManager[object]:
        return self.accelerator.no_sync(self._wrapped)

    def forward(self, *arguments: Any) -> dict[str, Any]:
        return self._wrapped(*arguments)

    def clip(self, parameters: Sequence[Tensor], limit: float) -> float:
        norm = self.accelerator.clip_grad_norm_(list(parameters), limit)
        return float(norm) if norm is not None else 0.0


class Sharded(_Torch):
    """Every process holds its rows of each weight, gradient and moment of the task, and gathers a layer's weights while
    it runs (FSDP2). The task is changed in place: its parameters are others afterwards, of the same names.

    The language model's layers are gathered one by one. All else belongs to the task itself and stays gathered from the
    start of its forward to the end of its backward: what the fused loss head reads, and modules that run only where a
    process has pictures, since gathering is a collective call. A frozen tower is whole everywhere.

    With bf16, layers are gathered in bf16, and gradients are added up in fp32.
    """

    def __init__(self, accelerator: Accelerator, task: Task, machine: MachineSpec) -> None:
        self.accelerator, self._task = accelerator, task
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        offload = OffloadPolicy()
        if machine.offload:
            offload = CPUOffloadPolicy(pin_memory=accelerator.device.type == "cuda")
        whole: set[nn.Parameter] = set()
        if not task.vision_trains:
            whole = set(task.student.model.vision_tower.parameters())  # pyright: ignore
        layers = [] if isinstance(task.student, Alone) else forward.layers(task.student)
        for layer in layers:
            policy = rounded if machine.precision == "bf16" else exact
            fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload)
        fully_shard(task, mesh=mesh, mp_policy=exact, offload_policy=offload, ignored_params=whole)
        # A layer whose input needs no gradient splits its own later than others do: it must need one everywhere.
        task.in_step = True
        register_fsdp_forward_method(task, "moves")

    def micro_batches(self, own: Collection[Batch], idle: Batch) -> Collection[Batch]:
        counts = self._of_all(torch.tensor([len(own)], device=self.accelerator.device))
        most = max(1, *map(int, counts))
        return MicroBatches(most, itertools.chain(own, itertools.repeat(idle, most - len(own))))

    def gathering(self) -> contextlib.AbstractContextManager[object]:
        # Gradients that are not split at once would be as large as the student.
        return contextlib.nullcontext()

    def forward(self, *arguments: Any) -> dict[str, Any]:
        with self.accelerator.autocast():
            return self._task(*arguments)

    def clip(self, parameters: Sequence[Tensor], limit: float) -> float:
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
        squares = norms.square().sum().to(self.accelerator.device)
        norm = sum(map(float, self._of_all(squares[None]))) ** 0.5
        if (factor := limit / (norm + 1e-6)) < 1:  # torch's own clipping
            torch._foreach_mul_(gradients, factor)
        return norm

    def _of_all(self, own: Tensor) -> tuple[Tensor, ...]:
        """A number, [1], of every process."""
        return self.accelerator.gather(own).unbind()  # pyright: ignore


def sharded(machine: MachineSpec, accelerator: Accelerator) -> bool:
    """Whether processes hold parts of the student or of its optimiser: there must be several to share it."""
    return machine.parallel != "ddp" and accelerator.num_processes > 1


def shard_teacher(vlm: VLM, accelerator: Accelerator) -> None:
    """Split the layers of a frozen language model over the processes, which gather them one by one; what is around them
    stays whole, since losses read the head. Does nothing where that was done before."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in forward.layers(vlm.model):
        if not any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
