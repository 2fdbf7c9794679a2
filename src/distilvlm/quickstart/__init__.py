"""`distilvlm quickstart`: a teacher, a control and a distilled student, trained and compared in minutes on a CPU."""

from .steps import quickstart

__all__ = ["quickstart"]
