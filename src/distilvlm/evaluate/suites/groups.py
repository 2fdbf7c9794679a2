"""Questions that are judged together: both about one picture (MME), all rotations of a question's options (MMBench)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distilvlm.evaluate.measures import Answered


def together(samples: Sequence[Answered]) -> list[Answered]:
    """Each answer with `first`, whether it is the first of its `group`, and `all_right`, whether all of that are."""
    right: dict[object, bool] = {}
    for one in samples:
        right[one.details["group"]] = right.get(one.details["group"], True) and one.details["right"]
    seen: set[object] = set()
    found: list[Answered] = []
    for one in samples:
        group = one.details["group"]
        found.append(replace(one, details={**one.details, "first": group not in seen, "all_right": right[group]}))
        seen.add(group)
    return found


def all_right(one: Answered) -> tuple[float, float]:
    """Parts of the share of groups all of whose answers are right."""
    return one.details["first"] * one.details["all_right"], one.details["first"]


def first_right(one: Answered) -> tuple[float, float]:
    """Parts of the accuracy on the first question of every group."""
    return one.details["first"] * one.details["right"], one.details["first"]
