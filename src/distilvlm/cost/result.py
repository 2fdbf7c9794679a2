"""What an estimate says of a stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .look import Look


@dataclass(frozen=True)
class StageCost:
    """A stage's cost; None where it cannot be known, with the reason in `notes`."""

    stage: str
    peak_memory_bytes: int | None
    seconds_per_update: float | None
    disk_bytes: int | None  # what the stage leaves in the run's directory; the last one with the finished student
    memory: dict[str, int] = field(default_factory=dict)  # what the peak consists of
    time: dict[str, float] = field(default_factory=dict)  # what an update of median size consists of
    disk: dict[str, int] = field(default_factory=dict)  # 'checkpoints' are there only while the stage runs
    updates: int | None = None
    seconds: float | None = None  # the whole stage
    look: Look | None = None  # of a stage of preferences, before it begins
    waiting: int = 0  # bytes of each process in the CPU's memory beside the device's (machine.offload)
    fits: bool = True  # in the memory of this machine or card
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
