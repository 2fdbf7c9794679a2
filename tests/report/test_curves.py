"""Curves keep their peaks, axes their sense."""

from __future__ import annotations

import math
import re

import pytest

from distilvlm.report.axes import Axis, fitted, labels, linear_ticks, reading
from distilvlm.report.curves import POINTS, Line, chart, smoothed, thinned


def test_thinning_keeps_ends_and_extremes() -> None:
    x = list(range(10_000))
    y = [math.sin(place / 300) for place in x]
    y[1234], y[8765] = 50.0, -50.0
    points = thinned(x, y)
    assert len(points) <= POINTS
    assert points[0] == (0, y[0]) and points[-1] == (9_999, y[-1])
    assert (1234, 50.0) in points and (8765, -50.0) in points
    assert [place for place, _ in points] == sorted(place for place, _ in points)


def test_a_short_line_is_drawn_as_it_is() -> None:
    assert thinned([1, 2, 3], [5.0, 4.0, 9.0]) == [(1, 5.0), (2, 4.0), (3, 9.0)]


def test_smoothing_is_a_centred_mean() -> None:
    assert smoothed([3.0]) == [3.0]
    assert smoothed([0.0, 3.0, 6.0, 0.0]) == [0.0, 3.0, 3.0, 0.0]
    values = smoothed([2.0] * 500)
    assert values == pytest.approx([2.0] * 500)


def test_an_axis_is_logarithmic_where_values_span_decades() -> None:
    wide = fitted([0.001, 5.0], 0, 100)
    assert wide.log
    assert wide.ticks() == [0.001, 0.01, 0.1, 1.0]
    assert wide.place(0.1) - wide.place(0.01) == pytest.approx(wide.place(1.0) - wide.place(0.1))
    assert not fitted([0.0, 5.0], 0, 100).log  # 0 has no place on a logarithmic axis
    assert not fitted([1.0, 5.0], 0, 100).log


def test_an_axis_starts_at_zero_where_zero_is_near() -> None:
    assert fitted([0.5, 5.0], 0, 100).low == 0
    assert fitted([4.0, 5.0], 0, 100).low > 3
    flat = fitted([2.0, 2.0], 0, 100)
    assert flat.low < 2 < flat.high


def test_ticks_are_round_and_written_alike() -> None:
    assert linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert linear_ticks(-4.2, 1.1) == [-4, -3, -2, -1, 0, 1]
    assert labels([0, 5e-4, 1e-3, 1.5e-3, 2e-3]) == ["0", "5e-4", "1e-3", "1.5e-3", "2e-3"]
    assert labels([0, 0.02, 0.04]) == ["0", "0.02", "0.04"]
    assert labels([0, 20_000]) == ["0", "20k"]
    assert [reading(value) for value in (8.0, 0.0123456, 2.5e-5, 1234.0, 0.0)] == [
        "8.00",
        "0.0123",
        "2.5e-5",
        "1,234",
        "0",
    ]


def test_a_chart_draws_each_value_and_its_mean_in_the_colour_of_its_run() -> None:
    drawn = chart("loss", [Line("a", 0, [1, 2, 3], [4.0, 2.0, 0.5]), Line("b", 2, [1, 2], [1.0, float("nan")])])
    assert re.findall(r'class="(raw|mean) (s\d)"', drawn.svg) == [
        ("raw", "s0"),
        ("raw", "s2"),
        ("mean", "s0"),
        ("mean", "s2"),
    ]
    assert "loss over updates: a from 4.00 to 0.500; b from 1.00 to 1.00" in drawn.svg
    assert "nan" not in drawn.svg
    assert drawn.ends == [("a", 0, "0.500"), ("b", 2, "1.00")]


def test_a_name_is_never_markup() -> None:
    assert "<b>" not in chart("<b>", [Line('"<b>', 0, [1], [1.0])]).svg


def test_what_lies_outside_an_axis_stands_at_its_border() -> None:
    assert Axis(0, 1, 10, 20).place(7) == 20
