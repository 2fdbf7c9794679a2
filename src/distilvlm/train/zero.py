"""A student that processes share by DeepSpeed's ZeRO, stage 1 (machine.parallel: deepspeed).

Each process holds the whole weights and gradients, and its part of AdamW's moments. What is DeepSpeed's own stands in
the user's file; what the recipe decides is filled in, and never taken from there.

Stage 2 sends gradients as they come, in buckets, and compares nothing; stage 3 gathers weights as modules run. Which
come or run first depends on whether a process's micro-batch has pictures: both are left to FSDP2, which is told.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distilvlm.data import Batch
from distilvlm.recipe import RecipeError
from distilvlm.recipe.schema import MachineSpec, OptimSpec

from .optim import adamw
from .rows import held
from .task import Task

KNOWN = {
    "zero_optimization": {
        "stage",
        "allgather_partitions",
        "allgather_bucket_size",
        "reduce_scatter",
        "reduce_bucket_size",
        "contiguous_gradients",
        "offload_optimizer",
    },
    "offload_optimizer": {"device", "pin_memory"},
}
"""What a file may say: of these it was seen that the objective stays what it is, and a checkpoint all that there is."""
PRECISION = ("fp16", "bf16", "amp", "torch_autocast")


def configuration(machine: MachineSpec, optim: OptimSpec) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage: the user's file, completed by what the recipe decides. "auto", as
    transformers' files have it, counts as not said.

    Raises:
        RecipeError: the file is none, contradicts the recipe, or asks for what a run can't keep.
    """
    assert machine.deepspeed is not None  # the schema sees to it
    file = Path(machine.deepspeed)
    try:
        said = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"machine.deepspeed: {file} can't be read as JSON: {error}") from None
    if not isinstance(said, dict) or not isinstance(said.get("zero_optimization"), dict):
        raise RecipeError(f"machine.deepspeed: {file} has no object 'zero_optimization': {{\"stage\": 1}} is one")
    decided = {
        "train_batch_size": ("optim.batch", optim.batch),
        "train_micro_batch_size_per_gpu": ("machine.micro_batch", machine.micro_batch),
        "gradient_accumulation_steps": ("optim.batch and machine.micro_batch", None),
        "gradient_clipping": ("optim.clip", optim.clip),
        "optimizer": ("optim", None),
        "scheduler": ("optim.schedule", None),
        **dict.fromkeys(PRECISION, ("machine.precision", None)),
    }
    for name, (field, value) in decided.items():
        if name in said and not _left_open(said[name]) and said[name] != value:
            raise RecipeError(
                f"machine.deepspeed: {file}: '{name}' is {json.dumps(said[name])}, but the recipe's {field} decides "
                'it: remove it there, or write "auto"'
            )
    zero = _given(said["zero_optimization"])
    offload = _given(zero.get("offload_optimizer") or {})
    odd = [name for name in _given(said) if name not in KNOWN and name not in decided]
    odd += [f"zero_optimization.{name}" for name in zero if name not in KNOWN["zero_optimization"]]
    odd += [f"offload_optimizer.{name}" for name in offload if name not in KNOWN["offload_optimizer"]]
    if odd:
        known = ", ".join(sorted(KNOWN["zero_optimization"]))
        raise RecipeError(
            f"machine.deepspeed: {file}: '{odd[0]}' is not among what was tried with DeepSpeed here: remove it. In "
            f"zero_optimization stand {known}"
        )
    if zero.get("stage") != 1:
        raise RecipeError(
            f"machine.deepspeed: {file}: zero_optimization.stage is {json.dumps(zero.get('stage'))}: 1, which splits "
            "moments, is what there is. For gradients and weights as well set 'parallel: fsdp', which does the same"
        )
    if offload.get("device", "cpu") not in ("cpu", "none"):
        raise RecipeError(
            f"machine.deepspeed: {file}: offload_optimizer.device is {json.dumps(offload['device'])}: it is 'cpu' or "
            "'none'"
        )
    return {
        "zero_optimization": {**zero, **({"offload_optimizer": offload} if offload else {})},
        # The loop says when an update is whole, and has divided its loss by the update's samples.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip or 0.0,
        "zero_allow_untested_optimizer": True,  # it is torch's own AdamW
        "zero_force_ds_cpu_optimizer": False,
        # Without modules that would send their gradients in bf16: they are added up in fp32.
        "torch_autocast": {
            "enabled": machine.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


def _left_open(value: Any) -> bool:
    """Whether a field leaves it to others: "auto", switched off, or an object of nothing else."""
    if not isinstance(value, dict):
        return value == "auto"
    if value.get("enabled") is False:
        return True
    return all(_left_open(inner) for name, inner in value.items() if name != "type")


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value != "auto"}


def require(machine: MachineSpec, stages: Sequence[OptimSpec]) -> None:
    """Raises RecipeError where DeepSpeed is not installed, or its file is not for one of the stages."""
    if find_spec("deepspeed") is None:
        raise RecipeError("machine.parallel: deepspeed needs DeepSpeed: pip install 'distilvlm[deepspeed]'")
    for optim in stages:
        configuration(machine, optim)


def _deepspeed(device: torch.device) -> Any:
    """The package, which builds nothing and tells nothing but warnings."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    deepspeed = import_module("deepspeed")
    operations = import_module("deepspeed.ops")
    if device.type == "cpu":
        # Else it compiles a collective call for shared memory at its first use, and waits for ever for the lock of such
        # a compilation that was killed.
        vars(operations).setdefault("__compatible_ops__", {})
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Of names that torch is about to change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


class Zero:
    """Processes that share the moments of AdamW (DeepSpeed's ZeRO, stage 1).

    `held` are the parameters that train as a checkpoint keeps them, by name: this process's rows, views of the whole
    weights. `moments` stands for their optimiser there.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        machine: MachineSpec,
        optim: OptimSpec,
        parameters: Mapping[str, Mapping[str, nn.Parameter]],
    ) -> None:
        self.accelerator = accelerator
        settings = configuration(machine, optim)
        self.optimizer = adamw(parameters, optim)
        groups = [group["params"] for group in self.optimizer.param_groups]
        # From here on a group has one parameter, a process's part of all of the group's, one behind the other.
        self._engine: Any = _deepspeed(accelerator.device).initialize(
            model=task, optimizer=self.optimizer, config=settings, dist_init_required=False
        )[0]
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._rows = {p: _rows(p, mesh) for members in parameters.values() for p in members.values()}
        self.held: dict[str, Tensor] = {n: self._rows[p] for own in parameters.values() for n, p in own.items()}
        parts: dict[Tensor, Tensor] = {}
        for members, group in zip(groups, self.optimizer.param_groups, strict=True):
            (own,) = group["params"]
            # Made here as the first step would make it: DeepSpeed looks for all groups' behind the step of the first.
            zeros = {name: torch.zeros_like(own, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[own] = {"step": torch.tensor(0.0), **zeros}
            parts |= dict.fromkeys(members, own)
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        self.moments = Moments(self.optimizer, self._rows, parts)

    def take(self) -> None:
        """What was read into `held` becomes the weights of every process."""
        with torch.no_grad():
            for p, own in self._rows.items():
                p.copy_(own.full_tensor())
        self._engine.optimizer.refresh_fp32_params()

    def micro_batches(self, own: Collection[Batch], idle: Batch) -> Collection[Batch]:
        return own or [idle]  # gradients meet once in an update, in the order of the parameters

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        yield
        self._engine.set_gradient_accumulation_boundary(True)

    def forward(self, *arguments: Any) -> dict[str, Any]:
        return self._engine(*arguments)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def clip(self, parameters: Sequence[Tensor], limit: float) -> float:
        """The norm; gradients are scaled as the update is made."""
        norm = float(self._engine.optimizer.scaled_global_norm())
        return norm if norm >= 0 else float("nan")  # -1 says that it is not finite

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: gradients were dropped as the update was made, and what they are put into on a CPU must stay."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self._engine.step()

    def close(self) -> None:
        """Its hooks are gone from the student."""
        self._engine.destroy()


def _rows(parameter: nn.Parameter, mesh: DeviceMesh) -> DTensor:
    """This process's rows, as FSDP2 would split them: a view."""
    pieces, own = parameter.data.chunk(mesh.size()), mesh.get_local_rank()
    piece = pieces[own] if own < len(pieces) else parameter.data[:0]
    return DTensor.from_local(
        piece, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


class Moments:
    """The optimiser as a checkpoint sees it: `state` of each parameter's rows; any use of it is a collective call."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, rows: Mapping[nn.Parameter, Tensor], parts: Mapping[Tensor, Tensor]
    ) -> None:
        self.state = {own: _State(p, own, optimizer.state[parts[p]]) for p, own in rows.items()}


class _State:
    """One parameter's: a moment is put together for as long as this process's rows of it are taken."""

    def __init__(self, parameter: nn.Parameter, own: Tensor, part: dict[str, Tensor]) -> None:
        self._parameter, self._own, self._part = parameter, own, part

    def items(self) -> Iterator[tuple[str, Tensor]]:
        whole: Any = import_module("deepspeed.utils").safe_get_full_optimizer_state
        for name, value in self._part.items():
            rows = whole(self._parameter, name)[held(self._own)] if value.ndim else value
            yield name, rows.clone()  # the whole is let go, and a group's counter is each parameter's

    def __setitem__(self, name: str, value: Tensor) -> None:
        if isinstance(value, DTensor):
            import_module("deepspeed.utils").safe_set_full_optimizer_state(self._parameter, value.full_tensor(), name)
        else:
            self._part[name] = value
