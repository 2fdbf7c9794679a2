"""Losses as pure functions of hidden states, heads and rows. Nothing here imports the rest of the package."""

from distilvlm.losses.answers import Answers, Preferences
from distilvlm.losses.balance import balance
from distilvlm.losses.encoder import Comparing, Pair, Pictures, comparing
from distilvlm.losses.linear import Distillation, linear_distillation
from distilvlm.losses.objective import Objective, Outcome
from distilvlm.losses.preference import preference, rated
from distilvlm.losses.relation import gram, relation
from distilvlm.losses.sparse import Sparse
from distilvlm.losses.standardisation import Moments, Standardisation
from distilvlm.losses.targets import Targets

__all__ = [
    "Answers",
    "Comparing",
    "Distillation",
    "Moments",
    "Objective",
    "Outcome",
    "Pair",
    "Pictures",
    "Preferences",
    "Sparse",
    "Standardisation",
    "Targets",
    "balance",
    "comparing",
    "gram",
    "linear_distillation",
    "preference",
    "rated",
    "relation",
]
