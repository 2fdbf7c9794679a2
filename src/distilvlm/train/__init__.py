"""One loop for every stage, over accelerate; the task module that it wraps; optimiser groups."""

from .loop import Loop, Update
from .task import Task, objective_of
from .unsound import ExplodingError, NonFiniteError, UpdateError

__all__ = ["ExplodingError", "Loop", "NonFiniteError", "Task", "Update", "UpdateError", "objective_of"]
