"""Checkpoints: what trains, its optimiser, random states and the data position, built aside and renamed.

The frozen rest is not in a checkpoint: it is rebuilt from the recipe and the finished stages, and its hash is compared.
Where weights are split over processes, each writes the rows that it holds (`weights-00001-of-00004.safetensors`,
likewise the optimiser); any number of processes reads them, each what it needs (stored.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from distilvlm.errors import readable
from distilvlm.models.files import directory_whole, remove, verify, write_whole
from distilvlm.train.optim import Kept, load_state_tensors, state_tensors
from distilvlm.train.rows import held, local

from .directory import RunError
from .stored import Stored, part

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
    parameters: Mapping[str, Tensor],
    optimizer: Kept | None,
    random_states: Mapping[str, Tensor],
    accelerator: Accelerator,
) -> None:
    """Write a checkpoint (or, without an optimiser, a finished stage) to `directory`, whole or not at all.

    Every process calls it. A file of weights, and one of the optimiser, are written by the main process, or by each
    process where weights are split; all else by the main process, the manifest last.
    """
    split = any(isinstance(parameter, DTensor) for parameter in parameters.values())
    if not accelerator.is_main_process:
        if split:
            _write_rows(_told(None), parameters, optimizer, accelerator)
            accelerator.wait_for_everyone()
        return
    with directory_whole(directory) as partial:
        if split:
            _told(partial)
            _write_rows(partial, parameters, optimizer, accelerator)
            accelerator.wait_for_everyone()
        else:
            for stem, tensors in _tensors(parameters, optimizer):
                save_file(tensors, partial / f"{stem}.safetensors")
        if optimizer is not None:
            save_file(dict(random_states), partial / "random.safetensors")
        (partial / "position.json").write_text(json.dumps(asdict(position), indent=1))


def _told(partial: Path | None) -> Path:
    """The directory that the main process fills."""
    found = [partial]
    broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _write_rows(
    partial: Path,
    parameters: Mapping[str, Tensor],
    optimizer: Kept | None,
    accelerator: Accelerator,
) -> None:
    if not partial.is_dir():
        raise RunError(f"{partial.parent} is not there for process {accelerator.process_index}: all must see one --dir")
    for stem, tensors in _tensors(parameters, optimizer):
        file = partial / part(stem, accelerator.process_index, accelerator.num_processes)
        # On its disk before the main process writes the manifest, perhaps on another machine.
        write_whole(file, lambda aside, tensors=tensors: save_file(tensors, aside))


def _tensors(parameters: Mapping[str, Tensor], optimizer: Kept | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """File by file: what this process holds of the weights, and of the optimiser's state."""
    yield "weights", _on_host({name: local(parameter) for name, parameter in parameters.items()})
    if optimizer is not None:
        names = {parameter: name for name, parameter in parameters.items()}
        yield "optimizer", _on_host(state_tensors(optimizer, names))


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
    with readable(directory):
        return Position(**json.loads((directory / "position.json").read_text()))


def load_weights(directory: Path, parameters: Mapping[str, Tensor]) -> None:
    """Copy the weights into `parameters`, strictly; of those that are split, the rows that this process holds.

    Raises:
        RunError: a name or shape is not as expected.
    """
    with readable(directory), Stored(directory, "weights") as stored:
        if stored.names != parameters.keys():
            odd = sorted(stored.names ^ parameters.keys())
            raise RunError(
                f"{directory} holds other weights than this stage trains: {odd[:5]} ({len(odd)} names differ)"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.shape != (there := stored.shape(name)):
                    raise RunError(f"{directory}: {name} has shape {tuple(there)}, not {tuple(parameter.shape)}")
                local(parameter).copy_(stored.rows(name, held(parameter)))


def load(directory: Path, parameters: Mapping[str, Tensor], optimizer: Kept) -> dict[str, Tensor]:
    """Put weights and optimiser back; returns the random states of every process that made the checkpoint.

    Raises:
        RunError: a name or shape is not as expected.
    """
    load_weights(directory, parameters)
    names = {parameter: name for name, parameter in parameters.items()}
    with readable(directory), Stored(directory, "optimizer") as stored:
        # In one order on every process: where parts are put together, each is a collective call.
        owners = {key: key.rpartition("::")[0] for key in sorted(stored.names)}
        if owners and set(owners.values()) != parameters.keys():
            odd = sorted(set(owners.values()) ^ parameters.keys())
            raise RunError(
                f"{directory} holds the optimiser's state of other parameters: {odd[:5]} ({len(odd)} names differ)"
            )
        read = {key: stored.rows(key, held(parameters[name])) for key, name in owners.items()}
    load_state_tensors(optimizer, read, names)
    with readable(directory):
        return load_file(directory / "random.safetensors")
