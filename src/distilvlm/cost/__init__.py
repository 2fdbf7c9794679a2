"""What a stage costs: memory, time and disk, estimated before it runs and measured while it does."""

from .compare import as_bytes, as_seconds, compare, line, load, record
from .estimate import StageCost, estimate, this_machine
from .meter import Measured, Meter
from .shapes import stage_data

__all__ = [
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
    "stage_data",
    "this_machine",
]
