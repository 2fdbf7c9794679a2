"""Whether a stage's loss or gradient explodes: many times its own median, in several updates in a row."""

from __future__ import annotations

import statistics
from collections import deque

from distilvlm.recipe.faults import Explosion

ENOUGH = 20
"""Updates before which there is nothing to compare with: a stage's first ones are often its largest."""


class Watch:
    """Sees the loss and gradient norm of every update, which are the same on every process: so is what it says.

    Medians are of all updates before, exploding ones too: a level that stays is not an explosion for ever. They begin
    anew where a run continues.
    """

    def __init__(self, rule: Explosion) -> None:
        self._rule = rule
        self._limits = {"loss": rule.loss, "gradient norm": rule.gradient}
        self._before = {name: deque[float](maxlen=rule.window) for name in self._limits}
        self._row = dict.fromkeys(self._limits, 0)

    def see(self, loss: float, norm: float) -> str | None:
        """What is exploding, once for as long as it lasts; None as a rule."""
        if self._rule.then == "off":
            return None
        found: list[str] = []
        for name, value in (("loss", loss), ("gradient norm", norm)):
            before, limit = self._before[name], self._limits[name]
            usual = statistics.median(before) if len(before) >= ENOUGH else 0.0
            # Of a loss around 0, or below it, multiples say nothing.
            self._row[name] = self._row[name] + 1 if usual > 0 and value > limit * usual else 0
            before.append(value)
            if self._row[name] == self._rule.updates:
                found.append(
                    f"its {name} has been over {limit:g} times its median for {self._rule.updates} updates "
                    f"(now {value:.3g}, median {usual:.3g})"
                )
        return " and ".join(found) or None
