"""Torch's random states of every process: dropout must go on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


def seed_stage(seed: int, stage: int, process: int, update: int = 0) -> None:
    """Start a stage's random numbers, or begin anew behind an update; every stage and process has its own."""
    torch.manual_seed(((seed * 1_000_003 + stage) * 4_099 + process + update * 7_368_787) % 2**63)


def states(accelerator: Accelerator) -> dict[str, Tensor]:
    """States of all processes; a collective call."""
    mine = {f"{accelerator.process_index}.cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        mine[f"{accelerator.process_index}.cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return {name: state for one in gather_object([mine]) for name, state in one.items()}


def restore(saved: Mapping[str, Tensor], accelerator: Accelerator) -> bool:
    """Put this process's states back; false, and nothing is done, where another number of processes has saved them."""
    if sum(name.endswith(".cpu") for name in saved) != accelerator.num_processes:
        return False
    mine = str(accelerator.process_index)
    torch.set_rng_state(saved[f"{mine}.cpu"])
    if accelerator.device.type == "cuda" and f"{mine}.cuda" in saved:
        torch.cuda.set_rng_state(saved[f"{mine}.cuda"], accelerator.device)
    return True
