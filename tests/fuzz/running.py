"""Many inputs to a target, always the same ones for a seed."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.tally import Tally, memory
from tests.fuzz.targets import TARGETS

ROOM = 3 << 30
"""Address space that all inputs of a target together may take: two pictures of the largest size that is read."""


def fuzz(name: str, inputs: int, directory: Path, start: int = 0) -> Tally:
    """Give `inputs` inputs to a target of `TARGETS`, in this process, which gets no more memory than `ROOM`."""
    target = TARGETS[name](directory)
    tally = Tally()

    @seed(start)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.strategy)
    def one(made: Any) -> None:
        tally.run(target.run, made)

    # What is said of each damaged input is nobody's here.
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), memory(ROOM):
            warnings.simplefilter("ignore")
            one()
    finally:
        logging.disable(logging.NOTSET)
    return tally
