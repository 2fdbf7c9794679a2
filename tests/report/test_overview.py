"""Models by benchmarks, what they are and cost, the gap that is closed, and quality drawn against both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distilvlm.report.formats import Figure, Interval, QuestionSet
from distilvlm.report.overview import overview
from distilvlm.report.read import Comparison, read
from distilvlm.report.scatter import Point, scatter

SERIES = {"teacher": 0, "control": 1, "distilled": 2}


@pytest.fixture(scope="module")
def read_comparison(comparison: Path) -> Comparison:
    found = read(comparison)
    assert isinstance(found, Comparison)
    return found


def words(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_a_cell_over_several_seeds_is_their_mean_and_their_range(read_comparison: Comparison) -> None:
    rows = {row.name: row for row in overview(read_comparison.file, SERIES).rows}
    assert list(rows) == ["majority", "teacher", "control", "distilled"]
    # Both seeds have the same scores here: 4 of 7 for the teacher, 2 for the control, 3 for the distilled.
    assert rows["teacher"].cells[0].score == "57.1 [57.1, 57.1]"
    assert [row.cells[0].best for row in rows.values()] == [False, True, False, False]
    # The first seed's gap is not clear, the second's is made up.
    assert [row.cells[0].closed for row in rows.values()] == ["", "", "", "62.5 [25.0, 112.5]% of the gap"]


def test_one_seed_has_its_interval_and_lower_may_be_better(read_comparison: Comparison) -> None:
    file = read_comparison.file
    one = file.model_copy(update={"seeds": file.seeds[:1]})
    found = file.seeds[0].rows["colours"]["teacher"].figures["accuracy"]
    assert isinstance(found, Interval)
    shown = next(row for row in overview(one, SERIES).rows if row.name == "teacher")
    assert shown.cells[0].score == f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    measures = {"lower": [Figure(name="accuracy", title="mistakes", better="lower")]}
    questions = {"colours": QuestionSet(title="Colours", measure="lower", n=7)}
    lower = file.model_copy(update={"measures": measures, "questions": questions})
    told = overview(lower, SERIES)
    assert [row.name for row in told.rows if row.cells[0].best] == ["control"]
    assert told.columns[0].figure == "mistakes in % (lower is better)"


def test_the_page_tells_size_speed_cost_and_the_gap(comparison_page: str) -> None:
    told = words(comparison_page)
    assert "7,007,000" in told and "7,006,966" in told  # all, and those that serve a token
    assert "330 MB" in told and "12.5" in told and "98.7" in told
    assert "32 new tokens behind a picture and a short question, fp32" in told
    assert "The gap is what teacher is ahead of control" in told
    assert "62.5 [25.0, 112.5]" in told  # of the second seed
    assert "no gap" in told  # of the first
    assert comparison_page.count('<svg class="scatter"') == 2  # against size, and against training


def test_a_chart_is_left_out_where_all_models_are_alike(read_comparison: Comparison) -> None:
    file = read_comparison.file
    alike = {name: file.models["control"].model_copy(update={"training_seconds": None}) for name in file.models}
    assert overview(file.model_copy(update={"models": alike}), SERIES).charts == []


def test_points_stand_at_their_values_with_their_intervals() -> None:
    points = [
        Point("small", 0, 100.0, [(50.0, 40.0, 60.0)], "100"),
        Point("<large>", 1, 200.0, [(70.0, 65.0, 75.0), (72.0, 66.0, 78.0)], "200"),
    ]
    svg = str(scatter("Accuracy", points, "parameters").svg)
    marks = [
        tuple(map(float, one)) for one in re.findall(r'class="point s\d" transform="translate\((\S+) (\S+)\)', svg)
    ]
    assert len(marks) == 3 and svg.count("whisker") == 3
    assert marks[0][0] < marks[1][0] == marks[2][0]  # to the right with more parameters
    assert marks[0][1] > marks[1][1] > marks[2][1]  # upwards with a better score
    assert "&lt;large&gt; 71.0 at 200" in svg and "<large>" not in svg
    low, high = re.search(r'class="whisker s0" d="M\S+,(\S+)V(\S+)"', svg).groups()  # pyright: ignore
    assert float(low) > marks[0][1] > float(high)
