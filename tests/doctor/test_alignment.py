"""How much of the answers a teacher of other tokens reaches."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilvlm.data import DataReport, SourceReport
from distilvlm.doctor import alignment
from distilvlm.recipe import load_recipe

from .conftest import Examine


def check(place: Path, report: DataReport, **changes: object) -> list[tuple[str, str | None]]:
    recipe = load_recipe(place / "recipe.yaml", {key.replace("__", "."): value for key, value in changes.items()})
    return [(one.level, one.stage) for one in alignment.check(recipe, {"dft": report})]


@pytest.mark.parametrize(("paired", "level"), [(0, "error"), (1, "warning"), (4, "warning"), (5, "ok"), (10, "ok")])
def test_less_than_half_is_a_warning_and_nothing_an_error(place: Path, paired: int, level: str) -> None:
    report = DataReport({"questions": SourceReport(learned=10, paired=paired, teachers_longest=30)})
    assert check(place, report) == [(level, "dft")]


def test_it_is_said_of_response_terms_and_own_rows_alone(place: Path) -> None:
    own = DataReport({"questions": SourceReport(learned=10, paired=0, teachers_longest=30)})
    assert not check(place, own, stages__dft__loss__response=0)
    assert not check(place, DataReport({"questions": SourceReport(learned=10)}))


def test_a_healthy_recipe_says_nothing_of_it(look: Examine) -> None:
    assert not [finding for finding in look() if finding.family == "alignment"]
