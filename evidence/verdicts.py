"""Whether what a paper claims holds in a table: by one rule, not by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distilvlm.evaluate import Interval

SEEDS = 3
"""Fewer decide nothing."""

LEAST = 0.01
"""Of shares (accuracy and the like): what is less than one point is not what a claim is about."""

HOLDS, DOES_NOT_HOLD, NOT_DECIDED = "holds", "does not hold", "not decided here"

RULE = """\
A claim is that one row is better than another, or that two are the same. It is judged by the paired differences, one a
seed, each with its 95% interval over pictures:

* **holds**: the difference has the claim's direction on every seed, and on more than half of them its interval excludes
  0.
* **does not hold**: on every seed there is no difference or the opposite one, and on more than half the interval
  excludes anything in the claim's favour; or on every seed the interval ends below one point in its favour (0 for what
  is no share).
* **not decided here**: everything else, and fewer than three seeds.

"The same" holds where every answer is worth the same on every seed, to the last digit; else it does not. A claim is the
paper's, or a control that the paper lacks, or ours.
"""


@dataclass(frozen=True)
class Claim:
    """What a paper, or a fair control, says about two rows.

    Args:
        says: in a sentence.
        source: whose claim it is.
        questions: the question set that tells.
        figure: of its measure.
        rows: the first is claimed to be better than the second, or the same.
    """

    says: str
    source: str
    questions: str
    figure: str
    rows: tuple[str, str]
    kind: Literal["better", "same"] = "better"

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Claim:
        """An entry of claims.yaml: one of its keys is `better` or `same`, with the two rows."""
        kind: Literal["better", "same"] = "better" if "better" in told else "same"
        first, second = told[kind]
        return cls(told["says"], told["source"], told["questions"], told["figure"], (first, second), kind)

    @property
    def pair(self) -> str:
        """As results name the difference."""
        return " - ".join(self.rows)


def verdict(claim: Claim, differences: Sequence[Interval], lower_is_better: bool, share: bool) -> str:
    """What the rule says.

    Args:
        differences: first row minus second, one a seed.
        lower_is_better: of the figure.
        share: whether the figure is one, so that a point is 0.01.
    """
    gains = [favour(one, lower_is_better) for one in differences]
    decided = _decided(claim, gains, LEAST if share else 0.0)
    if len(differences) >= SEEDS:
        return decided
    return f"{NOT_DECIDED}: {len(differences)} of {SEEDS} seeds, so far {'open' if decided == NOT_DECIDED else decided}"


def _decided(claim: Claim, gains: Sequence[Interval], least: float) -> str:
    if claim.kind == "same":
        return HOLDS if all(gain.low == gain.mean == gain.high == 0 for gain in gains) else DOES_NOT_HOLD
    most = len(gains) / 2
    if all(gain.mean > 0 for gain in gains) and sum(gain.low > 0 for gain in gains) > most:
        return HOLDS
    against = all(gain.mean <= 0 for gain in gains) and sum(gain.high <= 0 for gain in gains) > most
    return DOES_NOT_HOLD if against or all(gain.high < least for gain in gains) else NOT_DECIDED


def favour(difference: Interval, lower_is_better: bool) -> Interval:
    """By how much the first row is better."""
    return Interval(-difference.mean, -difference.high, -difference.low) if lower_is_better else difference
