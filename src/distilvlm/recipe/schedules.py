"""Values that change while a stage trains: weights of loss terms, and the temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from distilvlm.recipe.section import Section
from distilvlm.recipe.tree import is_mapping

SCHEDULED = ("text", "response", "visual", "relation", "temperature")
"""What a schedule may be of: what no part of a stage depends on alone, so that a weight may be 0 for a while."""


class Ramp(Section):
    """From one value to another. `begin` and `end` are shares of the stage's updates: 0 is the first, 1 the last."""

    start: float = Field(alias="from", ge=0, description="the value up to `begin`")
    stop: float = Field(alias="to", ge=0, description="the value from `end` on; default: the weight itself")
    shape: Literal["linear", "cosine"] = Field(default="linear", description="of the way between")
    begin: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _forward(self) -> Ramp:
        if self.begin > self.end:
            raise ValueError(f"a schedule can't end ({self.end:g}) before it begins ({self.begin:g})")
        return self

    def at(self, update: int, updates: int) -> float:
        """The value at `update` (0-based) of `updates`: a pure function, so a run that continues needs no state."""
        return self.at_share(update / max(1, updates - 1))

    def at_share(self, share: float) -> float:
        if share >= self.end:
            return self.stop
        if share <= self.begin:
            return self.start
        way = (share - self.begin) / (self.end - self.begin)
        if self.shape == "cosine":
            way = 0.5 * (1.0 - math.cos(math.pi * way))
        return self.start + (self.stop - self.start) * way

    def __str__(self) -> str:
        """`0 → 1 over the first 30%`."""
        when = f"from {self.begin:.0%} to {self.end:.0%}"
        if self.begin == 0:
            when = "over all updates" if self.end == 1 else f"over the first {self.end:.0%}"
        return f"{self.start:g} → {self.stop:g} {when}" + (", cosine" if self.shape == "cosine" else "")


def filled(loss: dict[str, Any]) -> dict[str, Any]:
    """A loss section as it is written, with what its schedules leave open: a schedule ends at the weight, and a weight
    that is not given is what its schedule ends at (or begins at, if it ends at 0), so that the term is one of the
    stage's."""
    schedule = loss.get("schedule")
    if not is_mapping(schedule):
        return loss  # pydantic says what is wrong with it
    given, ramps = dict(loss), dict(schedule)
    for name, ramp in ramps.items():
        if name not in SCHEDULED or not is_mapping(ramp):
            continue
        if "to" not in ramp and name in given:
            ramps[name] = {**ramp, "to": given[name]}
        elif name not in given and "to" in ramp:
            given[name] = ramp["to"] or ramp.get("from", 0)
    return given | {"schedule": ramps}


def check(schedule: Mapping[str, Ramp], weights: Mapping[str, float]) -> None:
    """Whether schedules and weights agree.

    Args:
        weights: term (and "temperature") -> its value in the section.

    Raises:
        ValueError: says which do not.
    """
    for name, ramp in schedule.items():
        if name not in SCHEDULED:
            raise ValueError(f"schedule.{name}: there is no such schedule; there is one of {', '.join(SCHEDULED)}")
        if not (ramp.start or ramp.stop):
            raise ValueError(f"schedule.{name} is 0 throughout: leave it out")
        if name == "temperature" and not (ramp.start and ramp.stop):
            raise ValueError("schedule.temperature reaches 0: a temperature is positive")
        if weights[name] not in (ramp.start, ramp.stop):
            raise ValueError(
                f"{name} is {weights[name]:g}, but its schedule goes from {ramp.start:g} to {ramp.stop:g}: leave "
                f"'{name}' or the schedule's 'to' out"
            )
    if "temperature" in schedule and not (weights["response"] or weights["visual"]):
        raise ValueError("schedule.temperature is of the response and visual terms, and there is neither: leave it out")
    edges = {0.0, 1.0, *(edge for ramp in schedule.values() for edge in (ramp.begin, ramp.end))}
    for share in sorted(edges if schedule else ()):
        terms = [name for name in SCHEDULED if name != "temperature"]
        if not any(schedule[name].at_share(share) if name in schedule else weights[name] for name in terms):
            raise ValueError(f"at {share:.0%} of the updates {', '.join(terms)} are all 0: keep one of them above")
