"""Executing recipes: the run directory, continuing, events, the plan."""
