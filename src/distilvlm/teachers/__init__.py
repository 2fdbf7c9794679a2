"""Where a stage's targets come from. Today: a teacher in this process (`local`)."""

from .interface import Targets, Teacher, TeacherError
from .local import LocalTeacher
from .references import References

__all__ = ["LocalTeacher", "References", "Targets", "Teacher", "TeacherError"]
