"""Do two programs that hold the same model say the same? Same picture, same prompt: logits within a bound, same tokens.

Both answer greedily. Their logits are compared at every step up to the first at which they choose another token: until
there both have read the same. Two programs round differently, so where two tokens are as likely as that, either may be
chosen. With all logits within the bound no other divergence is possible: it is told, with how far apart the two tokens
were, and is no failure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A question that both are asked."""

    name: str
    prompt: str
    picture: Image.Image | None = None  # upright, RGB


class Speaker(Protocol):
    """A program with a model in it, asked one case at a time."""

    @property
    def prompt(self) -> Sequence[int]: ...  # ids of the text that was read last, pictures left out
    @property
    def features(
        self,
    ) -> Tensor | None: ...  # [placeholders, d]: what is read for the picture; if known
    def begin(self, case: Case) -> Tensor: ...  # logits [V] fp32 of the answer's first token
    def step(self, token: int) -> Tensor: ...  # of the next one


@dataclass(frozen=True)
class Divergence:
    """The first token that differs."""

    step: int  # tokens before it are equal
    ours: int
    theirs: int
    gap: float  # our logit of our token less that of theirs


@dataclass(frozen=True)
class Compared:
    """One case."""

    name: str
    prompt: str
    same_prompt: bool  # the text became the same ids
    tokens: int  # equal ones, from the first
    text: str  # what was answered
    difference: float  # max |Δlogit| of steps that read the same
    largest: float  # max |logit| there
    features: float | None  # ‖Δ‖ / ‖ours‖ of what is read for the picture
    divergence: Divergence | None
    passed: bool

    def failure(self, bound: float) -> str:
        """What differs, in words."""
        if not self.same_prompt:
            return f"{self.name}: the prompt became other token ids"
        found = f"max |Δlogit| {self.difference:.2g} of logits up to {self.largest:.1f}, {bound:g} of them is the bound"
        if self.features is not None:
            found += f"; the picture's features differ by {self.features:.2g} of their size"
        if self.divergence is not None:
            apart = self.divergence
            found += f"; token {apart.step + 1} is {apart.theirs} instead of {apart.ours} ({apart.gap:.2g} ahead)"
        return f"{self.name}: {found}"


@dataclass(frozen=True)
class Parity:
    """What was compared for one set of files, and what came out. Not `checked`: `reason` says why."""

    what: str
    checked: bool
    bound: float | None = None  # of max |Δlogit| / max |logit|
    cases: tuple[Compared, ...] = ()
    reason: str = ""

    @property
    def passed(self) -> bool:
        """False only where something was compared and differs."""
        return all(case.passed for case in self.cases)

    @property
    def worst(self) -> float:
        """max |Δlogit| / max |logit| of all cases."""
        return max((case.difference / max(case.largest, 1e-30) for case in self.cases), default=0.0)

    def lines(self) -> list[str]:
        """For the screen."""
        if not self.checked:
            return [f"{self.what}: NOT CHECKED: {self.reason}"]
        assert self.bound is not None
        failed = [case for case in self.cases if not case.passed]
        tokens = sum(case.tokens for case in self.cases)
        diverged = [case for case in self.cases if case.divergence is not None]
        said = (
            f"{tokens} greedy tokens of {len(self.cases)} answers equal, max |Δlogit| {self.worst:.1e} of the largest"
        )
        if not failed:
            explained = f"; {len(diverged)} answers part where two tokens are nearly as likely" if diverged else ""
            return [f"{self.what}: parity: {said} (bound {self.bound:g}){explained}"]
        lines = [f"{self.what}: NO PARITY: {len(failed)} of {len(self.cases)} answers differ; {said}"]
        lines += [f"  {case.failure(self.bound)}" for case in failed[:5]]
        return [*lines, *([f"  {self.reason}"] if self.reason else [])]

    def as_json(self) -> dict[str, Any]:
        """For `parity.json`."""
        return {"passed": self.passed if self.checked else None, "worst": self.worst, **asdict(self)}


def compare(
    case: Case,
    ours: Speaker,
    theirs: Speaker,
    bound: float,
    *,
    ends: Collection[int],
    limit: int,
    comparable: Tensor,
    decode: Any,
) -> Compared:
    """Ask both one case.

    Args:
        bound: of max |Δlogit|, as a part of the largest logit.
        ends: ids that end an answer.
        limit: tokens of an answer at most.
        comparable: [V] bool, ids that both may choose: the id of `<image>` is none.
        decode: ids → text.
    """
    here, there = ours.begin(case), theirs.begin(case)
    features = _apart(ours.features, theirs.features)
    same_prompt = list(ours.prompt) == list(theirs.prompt)
    difference, largest = 0.0, 0.0
    answer: list[int] = []
    divergence: Divergence | None = None
    while True:
        rows = min(len(here), len(there), len(comparable))
        mine, other = (logits[:rows].masked_fill(~comparable[:rows], -torch.inf) for logits in (here, there))
        known = comparable[:rows]
        apart = (here[:rows] - there[:rows])[known].abs().nan_to_num(nan=torch.inf)
        difference = max(difference, float(apart.max()))
        largest = max(largest, float(here[:rows][known].abs().max()))
        chosen, others = int(mine.argmax()), int(other.argmax())
        if chosen != others:
            divergence = Divergence(len(answer), chosen, others, float(mine[chosen] - mine[others]))
            break
        if chosen in ends:
            break
        answer.append(chosen)
        if len(answer) == limit:
            break
        here, there = ours.step(chosen), theirs.step(chosen)
    within = math.isfinite(difference) and difference <= bound * largest
    return Compared(
        name=case.name,
        prompt=case.prompt,
        same_prompt=same_prompt,
        tokens=len(answer),
        text=decode(answer),
        difference=difference,
        largest=largest,
        features=features,
        divergence=divergence,
        passed=same_prompt and within,
    )


def _apart(ours: Tensor | None, theirs: Tensor | None) -> float | None:
    if ours is None or theirs is None:
        return None
    return float((ours - theirs).norm() / ours.norm()) if ours.shape == theirs.shape else float("inf")
