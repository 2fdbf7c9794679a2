"""One loop for every stage, over accelerate; the task module that it wraps; optimiser groups."""

from .loop import Loop, NonFiniteError, Update
from .task import Task, objective_of

__all__ = ["Loop", "NonFiniteError", "Task", "Update", "objective_of"]
