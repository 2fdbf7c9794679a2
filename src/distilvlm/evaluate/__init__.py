"""Asking a model questions and saying how well it answered. Read `report.py` first, then `measures.py`."""

from distilvlm.evaluate.baselines import majority, question_only
from distilvlm.evaluate.generate import answer
from distilvlm.evaluate.measures import ACCURATE, EXACT, Answered, Figure, Measure
from distilvlm.evaluate.metrics import (
    Interval,
    accurate,
    exact_match,
    interval,
    normalise,
    paired_difference,
    paired_ratios,
    ratio,
)
from distilvlm.evaluate.questions import Asked, Question, asked_of, questions_of
from distilvlm.evaluate.report import Evaluation, answered, ask, difference, evaluate, gap_closed, rescored, score
from distilvlm.evaluate.table import as_table, figure_table

__all__ = [
    "ACCURATE",
    "EXACT",
    "Answered",
    "Asked",
    "Evaluation",
    "Figure",
    "Interval",
    "Measure",
    "Question",
    "accurate",
    "answer",
    "answered",
    "as_table",
    "ask",
    "asked_of",
    "difference",
    "evaluate",
    "exact_match",
    "figure_table",
    "gap_closed",
    "interval",
    "majority",
    "normalise",
    "paired_difference",
    "paired_ratios",
    "question_only",
    "questions_of",
    "ratio",
    "rescored",
    "score",
]
