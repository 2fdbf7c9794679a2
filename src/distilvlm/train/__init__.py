"""One loop for every stage, over accelerate; the task module that it wraps; optimiser groups."""

from .loop import Loop, NonFiniteError, Update
from .task import Task

__all__ = ["Loop", "NonFiniteError", "Task", "Update"]
