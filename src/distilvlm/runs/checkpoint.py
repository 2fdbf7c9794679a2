"""Checkpoints: what trains, its optimiser, random states and the data position, built aside and renamed.

The frozen rest is not in a checkpoint: it is rebuilt from the recipe and the finished stages, and its hash is compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distilvlm.models.files import directory_whole, remove, verify
from distilvlm.train.optim import load_state_tensors, state_tensors

from .directory import RunError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """How far a stage is. The data position follows from `update`: the order of samples is a function of it."""

    stage: str
    update: int  # updates made
    events: int  # length of events.jsonl in bytes
    base: str  # hash of everything that does not train in this stage


def save(
    directory: Path,
    position: Position,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    random_states: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint (or, without an optimiser, a finished stage) to `directory`, whole or not at all."""
    with directory_whole(directory) as partial:
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        save_file(weights, partial / "weights.safetensors")
        if optimizer is not None:
            names = {parameter: name for name, parameter in parameters.items()}
            state = {k: v.detach().cpu().contiguous() for k, v in state_tensors(optimizer, names).items()}
            save_file(state, partial / "optimizer.safetensors")
            save_file(dict(random_states), partial / "random.safetensors")
        (partial / "position.json").write_text(json.dumps(asdict(position), indent=1))


def last_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose every file is what was written; damaged ones are named in the log and passed over."""
    for candidate in sorted(checkpoints.glob("[0-9]*"), reverse=True) if checkpoints.is_dir() else []:
        problems = verify(candidate)
        if not problems:
            return candidate
        logger.warning("%s is damaged (%s); falling back to the one before", candidate, "; ".join(problems))
    return None


def rotate(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in sorted(checkpoints.glob("[0-9]*"))[:-keep]:
        remove(old)


def read_position(directory: Path) -> Position:
    return Position(**json.loads((directory / "position.json").read_text()))


def load_weights(directory: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the weights into `parameters`, strictly.

    Raises:
        RunError: a name or shape is not as expected.
    """
    file = directory / "weights.safetensors"
    weights = load_file(file)
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise RunError(f"{file} holds other weights than this stage trains: {odd[:5]} ({len(odd)} names differ)")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise RunError(f"{file}: {name} has shape {tuple(weights[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(weights[name])


def load(
    directory: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Put weights and optimiser back; returns the random states of every process."""
    load_weights(directory, parameters)
    names = {parameter: name for name, parameter in parameters.items()}
    load_state_tensors(optimizer, load_file(directory / "optimizer.safetensors"), names)
    return load_file(directory / "random.safetensors")
