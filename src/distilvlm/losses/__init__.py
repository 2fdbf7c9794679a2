"""Losses as pure functions of hidden states, heads and rows. Nothing here imports the rest of the package."""

from distilvlm.losses.answers import Answers, Preferences
from distilvlm.losses.balance import balance
from distilvlm.losses.linear import Distillation, linear_distillation
from distilvlm.losses.objective import Objective, Outcome
from distilvlm.losses.preference import preference, rated
from distilvlm.losses.relation import gram, relation

__all__ = [
    "Answers",
    "Distillation",
    "Objective",
    "Outcome",
    "Preferences",
    "balance",
    "gram",
    "linear_distillation",
    "preference",
    "rated",
    "relation",
]
