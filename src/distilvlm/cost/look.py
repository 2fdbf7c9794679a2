"""What it takes, before a stage begins, that the teacher looks once at every record that it shows: at preferences, or
to fill a cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """Once per stage and not per update; None where it cannot be known. The teacher leaves memory behind it."""

    records: int | None
    peak_memory_bytes: int | None  # with the student, which waits
    seconds: float | None
    disk_bytes: int | None  # what is kept of it, in the run's directory or in the cache
