"""Where something that is not finite comes from: the update is run once more, as it was, with hooks on every module.

Costs an update's time, and only after it went wrong. Weights have not changed since, random numbers are drawn again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from distilvlm.data.batch import Batch
from distilvlm.teachers import Targets

from .loop import Loop

Kind = Literal["weights", "given", "forward", "loss", "gradient", "norm", "nothing", "split"]


@dataclass(frozen=True)
class Finding:
    """What the update looked like when it was run once more, on one process.

    kind: the first that was not finite: `weights` before the update; what is `given` to the student (a teacher's
        targets, features); what a module made in the `forward`; the `loss` of outputs that are finite; the `gradient`;
        its `norm` alone, of gradients that are; or `nothing` on this process. `split`: it was not run once more.
    """

    kind: Kind
    where: str  # in words
    micro_batch: int = 0  # 1-based; 0: none in particular
    batch: Batch | None = None
    samples: tuple[Mapping[str, float], ...] = ()  # terms of each of its samples alone, without weight


def inspect(
    loop: Loop, micro_batches: Iterable[tuple[Batch, Callable[[], Sequence[Batch]]]], samples: int, finite: bool
) -> Finding:
    """Run this process's part of the update that `loop` has given up.

    Args:
        micro_batches: each with a function that gives its samples as batches of their own.
        samples: of the whole update.
        finite: it is only too large: the sample with the largest loss is looked for.
    """
    loop.optimizer.zero_grad(set_to_none=True)
    if (name := _unsound_weight(loop)) is not None:
        batch = next((batch for batch, _ in micro_batches), None)
        return Finding("weights", f"the weight {name}, before the update", batch=batch)
    largest, found = -math.inf, Finding("nothing", "nothing on this process")
    with loop.now.again():
        for index, (batch, alone) in enumerate(micro_batches, 1):
            loop.now.do(f"looks for what went wrong in micro-batch {index}")
            if finite:
                terms = [_terms(loop, one) for one in alone()]
                if (most := max(one["loss"] for one in terms)) > largest:
                    largest = most
                    found = Finding("nothing", "the largest loss of one sample", index, batch, tuple(terms))
                continue
            unsound = _first_unsound(loop, batch, samples)
            if unsound is not None:
                terms = [_terms(loop, one) for one in alone()]
                loop.optimizer.zero_grad(set_to_none=True)
                return Finding(*unsound, index, batch, tuple(terms))
    if not finite and not math.isfinite(_norm(loop)):
        found = Finding("norm", "every gradient is finite, the sum of their squares is not")
    loop.optimizer.zero_grad(set_to_none=True)
    return found


def _unsound_weight(loop: Loop) -> str | None:
    for name, parameter in loop.task.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return name
    return None


def _norm(loop: Loop) -> float:
    gradients = [p.grad for p in loop.task.parameters() if p.grad is not None]
    return float(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm())


def _first_unsound(loop: Loop, batch: Batch, samples: int) -> tuple[Kind, str] | None:
    """Add the micro-batch's gradient; kind and place of the first that is not finite."""
    with _hooked(loop) as met, loop.accelerator.autocast():
        batch, features, targets, rows, seen = loop.given(batch)
        given = {"the features of the pictures": features, **_of_teacher(targets)}
        given |= {f"what encoder '{name}' saw": one.tokens for name, one in (seen or {}).items()}
        for name, tensor in given.items():
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                return "given", f"{name}: {met[0]}" if met else name
        result = loop.task(batch, features, targets, rows, samples, lambda local: local, seen)
        terms = {"loss": result["loss"], **result["terms"]}
        bad = [name for name, value in terms.items() if not math.isfinite(float(value.detach()))]
        if bad:
            return ("forward", met[0]) if met else ("loss", f"the loss itself ({', '.join(bad)}), of finite outputs")
        met.clear()
        result["loss"].backward()
    if met:
        return "gradient", met[0]
    for name, parameter in loop.task.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return "gradient", f"the gradient of {name}"
    return None


@torch.no_grad()
def _terms(loop: Loop, batch: Batch) -> dict[str, float]:
    """Loss and terms of a sample alone."""
    batch, features, targets, rows, seen = loop.given(batch)
    with loop.accelerator.autocast():
        result = loop.task(batch, features, targets, rows, 1, lambda local: local, seen)
    return {name: float(value) for name, value in {"loss": result["loss"], **result["terms"]}.items()}


def _of_teacher(targets: Targets | None) -> dict[str, Tensor | None]:
    if targets is None:
        return {}
    return {"the teacher's hidden states": targets.hidden, "the teacher's rows of pictures": targets.visual}


@contextlib.contextmanager
def _hooked(loop: Loop) -> Iterator[list[str]]:
    """Within, the list gets the first place at which something is not finite, forward or backward."""
    met: list[str] = []
    modules = dict(loop.task.named_modules())
    teacher = getattr(loop.teacher, "vlm", None)
    modules |= {} if teacher is None else {f"teacher.{name}": module for name, module in teacher.model.named_modules()}
    hooks = [hook for name, module in modules.items() if name for hook in _hooks(name, module, met)]
    try:
        yield met
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(name: str, module: nn.Module, met: list[str]) -> list[Any]:
    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        # Masks are -inf where nothing is to be seen.
        given = [value for key, value in named.items() if "mask" not in key]
        if not met and any(bool((one.isnan() | (one == math.inf)).any()) for one in _floats((arguments, given))):
            met.append(f"what goes into {name}")

    def behind(_: nn.Module, __: Any, output: Any) -> None:
        for one in _floats(output):
            if not met and not bool(torch.isfinite(one).all()):
                met.append(f"what comes out of {name}")
            if one.requires_grad:
                one.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        if not met and not bool(torch.isfinite(gradient).all()):
            met.append(f"the gradient that comes back to {name}")

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(behind),
    ]


def _floats(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
