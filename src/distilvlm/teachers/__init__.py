"""Where a stage's targets come from. Today: a teacher in this process (`local`)."""

from .interface import Targets, Teacher, TeacherError
from .local import LocalTeacher

__all__ = ["LocalTeacher", "Targets", "Teacher", "TeacherError"]
