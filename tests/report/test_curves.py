"""Curves keep their peaks, axes their sense."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from types import SimpleNamespace
from typing import cast

import pytest

from distilvlm.recipe import LossSpec
from distilvlm.report.axes import Axis, fitted, labels, linear_ticks, reading
from distilvlm.report.curves import (
    LEFT,
    LETTER,
    POINTS,
    RIGHT,
    WIDTH,
    Line,
    chart,
    grid,
    smoothed,
    stage_charts,
    thinned,
)
from distilvlm.report.formats import Update
from distilvlm.report.read import Run


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


def test_long_labels_of_neighbouring_ticks_do_not_run_into_each_other() -> None:
    svg = grid(Axis(22.25e6, 23e6, LEFT, WIDTH - RIGHT), Axis(0, 1, 180, 10), "parameters")
    places = [(float(x), label) for x, label in re.findall(r'x="([\d.]+)" y="202" text-anchor="middle">([^<]+)<', svg)]
    assert len(places) > 1
    assert all(right - left > LETTER * len(label) for (left, label), (right, _) in pairwise(places))


def taught(number: int, **terms: float) -> Update:
    values = {"stage": "d", "number": number, "loss": 1.0, "rate": 0.1, "gradient_norm": 1.0, "seconds": 1.0}
    return Update.model_validate({**values, "terms": terms})


def run_of(*updates: Update) -> Run:
    spec = SimpleNamespace(name="d", loss=LossSpec(encoder=1.0))
    return cast(
        Run,
        SimpleNamespace(
            stages=[SimpleNamespace(about=None, updates=list(updates), spec=spec, finished=True, planned=len(updates))]
        ),
    )


def test_teachers_of_one_run_share_a_chart_and_of_several_runs_each_has_one() -> None:
    terms = {"encoder": 3.0, "encoder.anchor": 1.0, "encoder.cnn": 2.0, "encoder_weight.anchor": 0.8}
    one = run_of(*(taught(number, **terms) for number in (1, 2)))
    (alone,) = stage_charts({"a": one}, {"a": 0})
    by_title = {drawn.title: drawn for drawn in alone.charts}
    assert "term: encoder (the whole loss)" in by_title  # teachers are no terms of their own
    distances = by_title["distance to each encoder's features"]
    assert distances.ends == [("cnn", 1, "2.00")] and distances.lines_are == "teachers"
    assert by_title["distance to the features of anchor"].ends == [("a", 0, "1.00")]  # far smaller: by itself
    assert by_title["how much each encoder counts"].ends == [("anchor", 0, "0.800")]
    (both,) = stage_charts({"a": one, "b": run_of(taught(1, **{"encoder.cnn": 4.0}))}, {"a": 0, "b": 1})
    by_title = {drawn.title: drawn for drawn in both.charts}
    assert by_title["distance to the features of cnn"].ends == [("a", 0, "2.00"), ("b", 1, "4.00")]
    assert by_title["distance to the features of anchor"].ends == [("a", 0, "1.00")]
    assert all(drawn.lines_are == "runs" for drawn in both.charts)
