"""Where costs are estimated and measured."""

from __future__ import annotations

import torch

from .meter import machine_bytes


def this_machine(device: torch.device | str | None = None) -> str:
    """Where costs are measured, for people: "cpu, 2 threads, 24.7 GB"."""
    place = torch.device(device) if device is not None else default_device()
    memory = machine_bytes(place)
    threads = f", {torch.get_num_threads()} threads" if place.type == "cpu" else ""
    return f"{place.type}{threads}" + ("" if memory is None else f", {memory / 1e9:.1f} GB")


def default_device() -> torch.device:
    """The device that a run would choose."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found
