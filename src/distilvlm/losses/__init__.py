"""Losses as pure functions of hidden states, heads and rows. Nothing here imports the rest of the package."""

from distilvlm.losses.linear import Distillation, linear_distillation
from distilvlm.losses.objective import Objective, Outcome
from distilvlm.losses.relation import gram, relation

__all__ = ["Distillation", "Objective", "Outcome", "gram", "linear_distillation", "relation"]
