"""What a run takes for trouble while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distilvlm.recipe.section import Section


class Explosion(Section):
    """When a stage's loss or gradient counts as exploding: so many times its median of the updates before, in several
    updates in a row. A value that is not finite stops a run in any case."""

    then: Literal["off", "warn", "stop"] = Field(
        default="warn", description="stop: before the update is made, and its batch is kept"
    )
    loss: float = Field(
        default=3.0, gt=1, description="times the median loss; 2.3 was the most in 104 stages that went well"
    )
    gradient: float = Field(
        default=10.0, gt=1, description="times the median gradient norm; 7.4 was the most in the same stages"
    )
    updates: int = Field(default=5, gt=0, description="updates in a row that are so")
    window: int = Field(
        default=100, ge=20, description="updates that the median is of; with fewer than 20 nothing is said"
    )
