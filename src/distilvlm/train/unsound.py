"""Updates that are not made, and the errors that say so: on every process the same, at the same update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self


class UpdateError(RuntimeError):
    """An update that was not made; weights, optimiser and checkpoints are as they were before it."""

    def __init__(
        self, what: str, update: int, terms: Mapping[str, float], rate: float, norm: float, account: str | None = None
    ) -> None:
        """
        Args:
            what: what is wrong, the first half of a sentence.
            terms: of the update, over all processes.
            rate: learning rate.
            norm: of the gradient.
            account: the whole message; default: what is known at once.
        """
        self.what, self.update, self.terms, self.rate, self.norm = what, update, dict(terms), rate, norm
        told = ", ".join(f"{name} {value:.4g}" for name, value in self.terms.items())
        super().__init__(
            account
            or f"{what} at update {update} ({told}; gradient norm {norm:.4g}; rate {rate:.3g}). The update was not made"
        )

    def told(self, account: str) -> Self:
        """The same error with all that was found out about it."""
        return type(self)(self.what, self.update, self.terms, self.rate, self.norm, account)


class NonFiniteError(UpdateError):
    """A loss term or the gradient is not finite."""


class ExplodingError(UpdateError):
    """Loss or gradient are far above what they were, and `machine.explosion` says to stop then."""


def require_finite(update: int, totals: Mapping[str, float], rate: float, norm: float) -> None:
    """Raises NonFiniteError, which names the terms.

    Args:
        totals: the loss and its terms over all processes: so each of them finds the same.
    """
    bad = [name for name, value in totals.items() if not math.isfinite(value)]
    if not bad and math.isfinite(norm):
        return
    named = [name for name in bad if name != "loss"] or bad
    what = f"loss term {', '.join(named)} is not finite" if named else "the gradient is not finite"
    raise NonFiniteError(what, update, totals, rate, norm)
