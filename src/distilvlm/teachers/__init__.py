"""Where a stage's targets come from: a teacher in this process (`local`), or what one gave before (`cached`)."""

from .cached import CachedTeacher
from .interface import Targets, Teacher, TeacherError, require
from .local import LocalTeacher
from .references import References

__all__ = ["CachedTeacher", "LocalTeacher", "References", "Targets", "Teacher", "TeacherError", "require"]
