"""Estimate and measurement side by side, on a line per stage and in a run's `cost.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .meter import Measured
from .numbers import as_bytes, as_seconds
from .result import StageCost

FIELDS = ("peak_memory_bytes", "seconds_per_update", "disk_bytes")


def compare(cost: StageCost, measured: Measured) -> dict[str, float | None]:
    """Estimate / measurement - 1 of memory, time and disk; None where one of the two is missing."""
    found: dict[str, float | None] = {}
    for name in FIELDS:
        expected, seen = getattr(cost, name), getattr(measured, name)
        found[name] = expected / seen - 1 if expected is not None and seen else None
    return found


def line(cost: StageCost, measured: Measured | None = None) -> str:
    """One line for a log, e.g. "stage 'sft': 1.9 GB estimated, 2.0 measured (-5%); 1.2 s/update ..."."""
    shown = [
        _pair(cost.peak_memory_bytes, measured and measured.peak_memory_bytes, as_bytes, " of memory"),
        _pair(cost.seconds_per_update, measured and measured.seconds_per_update, as_seconds, " per update"),
        _pair(cost.disk_bytes, measured and measured.disk_bytes, as_bytes, " on disk"),
    ]
    if cost.look is not None and measured is None:
        records = "its" if cost.look.records is None else f"{cost.look.records:,}"
        memory, seconds = cost.look.peak_memory_bytes, cost.look.seconds
        shown.append(
            f"before it, the teacher looks at {records} records once: "
            f"{'unknown' if memory is None else as_bytes(memory)} of memory, "
            f"{'unknown' if seconds is None else as_seconds(seconds)} in all, estimated"
        )
    return f"stage '{cost.stage}': " + "; ".join(shown)


def record(costs: Sequence[StageCost], measured: Mapping[str, Measured]) -> dict[str, Any]:
    """The content of a run's `cost.json`; `measured` by stage, without the stages that are still to come."""
    return {
        "stages": [
            {
                "stage": cost.stage,
                "estimate": {name: getattr(cost, name) for name in FIELDS},
                "measured": asdict(measured[cost.stage]) if cost.stage in measured else None,
                "parts": {"memory": cost.memory, "time": cost.time, "disk": cost.disk},
                "look": None if cost.look is None else asdict(cost.look),
                "notes": list(cost.notes),
            }
            for cost in costs
        ]
    }


def load(path: Path) -> dict[str, Measured]:
    """What a `cost.json` says was measured, by stage: a continued run adds to it. Empty where there is no file."""
    if not path.exists():
        return {}
    stages = json.loads(path.read_text())["stages"]
    return {entry["stage"]: Measured(**entry["measured"]) for entry in stages if entry["measured"] is not None}


def _pair(expected: float | None, seen: float | None, show: Any, what: str) -> str:
    estimated = "unknown" if expected is None else f"{show(expected)}"
    if seen is None:
        return f"{estimated}{what} estimated"
    error = "" if expected is None or not seen else f" ({expected / seen - 1:+.0%})"
    return f"{estimated}{what} estimated, {show(seen)} measured{error}"
