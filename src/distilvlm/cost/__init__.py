"""What a stage costs: memory, time and disk, estimated before it runs and measured while it does."""

from .look import Look
from .machine import this_machine
from .meter import Measured, Meter
from .numbers import as_bytes, as_seconds
from .result import StageCost
from .side_by_side import compare, line, load, record
from .stages import estimate

__all__ = [
    "Look",
    "Measured",
    "Meter",
    "StageCost",
    "as_bytes",
    "as_seconds",
    "compare",
    "estimate",
    "line",
    "load",
    "record",
    "this_machine",
]
