"""Optimiser groups and the learning-rate schedule of a stage.

The schedule is a pure function of the update's number, so a run that continues needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distilvlm.recipe.schema import OptimSpec

from .rows import local


class Kept(Protocol):
    """What a checkpoint asks of an optimiser: its state of each parameter, name -> value."""

    state: Any


def adamw(parameters: Mapping[str, Mapping[str, nn.Parameter]], spec: OptimSpec) -> torch.optim.AdamW:
    """AdamW over the parameters that train.

    Args:
        parameters: part name -> parameter name -> parameter.
        spec: rates, betas and decay. Decay is applied to matrices only, not to biases and norms.

    Raises:
        ValueError: `rates` names a part that does not train.
    """
    unknown = set(spec.rates) - set(parameters)
    if unknown:
        raise ValueError(f"optim.rates names {sorted(unknown)}, but this stage trains {sorted(parameters)}")
    groups = []
    for part, members in parameters.items():
        rate = spec.rates.get(part, spec.lr)
        for decays in (True, False):
            chosen = [p for p in members.values() if (p.ndim >= 2) == decays]
            if chosen:
                decay = spec.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": rate, "base_lr": rate, "weight_decay": decay, "part": part})
    return torch.optim.AdamW(groups, betas=spec.betas, eps=spec.eps)


def set_rates(optimizer: torch.optim.Optimizer, spec: OptimSpec, update: int, updates: int) -> float:
    """Set every group's rate for `update` (0-based) of `updates`; returns the factor."""
    factor = rate_factor(spec, update, updates)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return factor


def rate_factor(spec: OptimSpec, update: int, updates: int) -> float:
    """Share of the full rate at `update` (0-based): linear warm-up from 0, then the schedule down to 0.

    The shape of transformers' `get_cosine_schedule_with_warmup` (which LLaVA-KD uses through its Trainer): the warm-up
    has ceil(warmup · updates) updates and the first of them has rate 0.
    """
    rising = math.ceil(spec.warmup * updates)
    if update < rising:
        return update / max(1, rising)
    progress = (update - rising) / max(1, updates - rising)
    if spec.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if spec.schedule == "linear" else 1.0


def state_tensors(optimizer: Kept, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, `parameter name::state key`: it is kept as safetensors, not pickled. Of
    parameters that are split over processes, this one's rows."""
    return {
        f"{name}::{key}": local(value)
        for parameter, name in names.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_state_tensors(optimizer: Kept, tensors: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> None:
    """Put `state_tensors` back: of parameters that are split, the rows that are this process's now."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("::")
        parameter = by_name[name]
        if value.ndim == 0:  # AdamW keeps its step counter on the host, the moments beside the parameter
            optimizer.state[parameter][entry] = value.clone()
            continue
        state = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        local(state).copy_(value)
        optimizer.state[parameter][entry] = state
