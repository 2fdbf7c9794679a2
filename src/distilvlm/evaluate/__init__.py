"""Asking a model questions and saying how well it answered. Read `report.py` first."""

from distilvlm.evaluate.baselines import majority, question_only
from distilvlm.evaluate.generate import answer
from distilvlm.evaluate.metrics import Interval, accurate, exact_match, interval, normalise, paired_difference
from distilvlm.evaluate.questions import Question, questions_of
from distilvlm.evaluate.report import Answered, Evaluation, difference, evaluate, rescored, score
from distilvlm.evaluate.table import as_table

__all__ = [
    "Answered",
    "Evaluation",
    "Interval",
    "Question",
    "accurate",
    "answer",
    "as_table",
    "difference",
    "evaluate",
    "exact_match",
    "interval",
    "majority",
    "normalise",
    "paired_difference",
    "question_only",
    "questions_of",
    "rescored",
    "score",
]
