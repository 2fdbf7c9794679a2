"""What counts as an explosion, and what does not."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from distilvlm.recipe.faults import Explosion
from distilvlm.train.unsound import NonFiniteError, require_finite
from distilvlm.train.watch import ENOUGH, Watch


def told(values: list[float], **rule: Any) -> list[int]:
    """At which updates a loss of these values is told, beside a gradient that is always the same."""
    watch = Watch(Explosion(**rule))
    return [number for number, value in enumerate(values) if watch.see(value, 1.0)]


def test_a_rise_that_lasts_is_told_once() -> None:
    assert told([1.0] * 50 + [4.0] * 20) == [54]


def test_a_spike_is_not_told() -> None:
    assert told([1.0] * 50 + [100.0] * 4 + [1.0] * 50) == []


def test_a_second_explosion_is_told_again() -> None:
    assert told([1.0] * 50 + [4.0] * 6 + [1.0] * 9 + [4.0] * 6) == [54, 69]


def test_a_loss_that_falls_or_is_noisy_is_not_told() -> None:
    draw = random.Random(0)
    falls = [5 * math.exp(-n / 60) * draw.lognormvariate(0, 0.4) for n in range(400)]
    assert told(falls) == []


def test_the_first_updates_and_losses_around_zero_say_nothing() -> None:
    assert told([0.1] * (ENOUGH - 6) + [9.0] * 5) == []
    assert told([-1.0, 0.0] * 30 + [9.0] * 9) == []


def test_the_gradient_has_a_limit_of_its_own() -> None:
    watch = Watch(Explosion(gradient=4, updates=2))
    said = [watch.see(1.0, norm) for norm in [1.0] * 30 + [5.0, 5.0]]
    assert said[:-1] == [None] * 31 and "gradient norm has been over 4 times its median for 2 updates" in str(said[-1])


def test_off_is_off() -> None:
    assert told([1.0] * 50 + [400.0] * 20, then="off") == []


@pytest.mark.parametrize(
    "totals, norm, named",
    [
        ({"loss": math.nan, "text": 1.0, "response": math.nan}, math.nan, "loss term response is"),
        ({"loss": math.inf}, math.nan, "loss term loss is"),
        ({"loss": 1.0, "text": 1.0}, math.inf, "the gradient is"),
    ],
)
def test_the_term_is_named(totals: dict[str, float], norm: float, named: str) -> None:
    require_finite(1, {"loss": 1.0}, 0.1, 2.0)
    with pytest.raises(NonFiniteError, match=f"^{named} not finite at update 7"):
        require_finite(7, totals, 0.1, norm)
