"""A few strange inputs to each target; benchmarks/fuzz.py gives 10,000."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from distilvlm.errors import is_for_the_user, readable
from tests.fuzz import tally
from tests.fuzz.running import fuzz
from tests.fuzz.targets import TARGETS

SLOW = {"checkpoints": 6}


@pytest.mark.parametrize("name", TARGETS)
def test_only_errors_for_the_user_come_out(name: str, tmp_path: Path) -> None:
    found = fuzz(name, SLOW.get(name, 40), tmp_path)
    assert not found.defects
    assert sum(found.counts.values()) > found.counts["fine"]  # some of it is refused


def test_what_python_makes_of_our_code_is_a_defect() -> None:
    counted = tally.Tally()
    counted.run(int, "x")
    assert list(counted.defects) == ["defect: ValueError at outside"]
    try:
        with readable("x.json"):
            raise KeyError("metadata")
    except ValueError as error:
        assert is_for_the_user(error)
        assert str(error).startswith("x.json can't be read (KeyError: 'metadata'): is it whole?")


def test_an_input_that_takes_too_long_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "SECONDS", 0.01)
    counted = tally.Tally()
    counted.run(time.sleep, 1)
    assert list(counted.defects) == ["defect: TooSlowError at outside"]
