"""Scores with their intervals: rows for the comparison table, each with its dots and whiskers on one common scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from .axes import Axis, linear_ticks, number
from .formats import ComparisonFile, Interval, Summary

WIDTH, LINE = 260, 18
MARGIN = 10

Measure = Literal["accuracy", "exact_match"]
NAMES: dict[Measure, str] = {"accuracy": "accuracy", "exact_match": "exact match"}


@dataclass(frozen=True)
class Row:
    """One model, or one difference, over all seeds."""

    name: str
    series: int | None  # colour; None for what is no model
    cells: list[Interval | None]  # one per seed
    plot: Markup
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Models by seeds, or differences by seeds."""

    caption: str
    measure: str
    seeds: list[int]
    axis: Markup
    rows: list[Row]


def scores(file: ComparisonFile, questions: str, measure: Measure, series: dict[str, int]) -> Table | None:
    """Every baseline and model on one question set; None if no seed has been asked it."""
    asked = [scores.rows.get(questions, {}) for scores in file.seeds]
    names = [name for name in (*file.baselines, *file.models) if any(name in rows for rows in asked)]
    if not names:
        return None
    cells = {name: [_picked(rows.get(name), measure) for rows in asked] for name in names}
    scale = _scale([cell for row in cells.values() for cell in row if cell], 0.0, 1.0)
    rows = [
        Row(name, series.get(name), cells[name], _plot(cells[name], series.get(name), scale, None), _size(file, name))
        for name in names
    ]
    seeds = [scores.seed for scores in file.seeds]
    return Table(f"{NAMES[measure]} in %, higher is better", NAMES[measure], seeds, _axis(scale, None), rows)


def gaps(file: ComparisonFile, questions: str, series: dict[str, int]) -> Table | None:
    """Paired differences on one question set, in the order that the comparison states them."""
    given = [scores.differences.get(questions, {}) for scores in file.seeds]
    stated = [f"{a} - {b}" for a, b in file.differences]
    names = [*stated, *(name for found in given for name in found if name not in stated)]
    names = [name for name in dict.fromkeys(names) if any(name in found for found in given)]
    if not names:
        return None
    cells = {name: [found.get(name) for found in given] for name in names}
    scale = _scale([cell for row in cells.values() for cell in row if cell], -1.0, 1.0, zero=True)
    rows: list[Row] = []
    for name in names:
        colour = series.get(name.split(" - ")[0])
        drawn = _plot(cells[name], colour, scale, 0.0)
        rows.append(Row(name.replace(" - ", " − "), colour, cells[name], drawn, verdict(cells[name])))
    measure = NAMES[measured(file, questions)]
    seeds = [scores.seed for scores in file.seeds]
    caption = f"paired differences of {measure} in percentage points"
    return Table(caption, measure, seeds, _axis(scale, 0.0), rows)


def measured(file: ComparisonFile, questions: str) -> Measure:
    """Of which measure the differences are: as the file says, else that whose means they are the differences of."""
    told = file.questions[questions].measure
    if told is not None:
        return "exact_match" if told == "exact" else "accuracy"
    for measure in ("exact_match", "accuracy"):
        agree = [
            abs(_mean(rows.get(a), measure) - _mean(rows.get(b), measure) - gap.mean) < 1e-6
            for scores in file.seeds
            for rows in [scores.rows.get(questions, {})]
            for name, gap in scores.differences.get(questions, {}).items()
            for a, _, b in [name.partition(" - ")]
            if a in rows and b in rows
        ]
        if agree and all(agree):
            return measure
    return "accuracy"


def verdict(cells: Sequence[Interval | None]) -> str:
    """Whether the intervals exclude 0, in words."""
    there = [cell for cell in cells if cell is not None]
    above = sum(cell.low > 0 for cell in there)
    below = sum(cell.high < 0 for cell in there)
    if not above and not below:
        return "includes 0" if len(there) == 1 else f"includes 0 on all {len(there)} seeds"
    if len(there) == 1:
        return "above 0: the interval excludes 0" if above else "below 0: the interval excludes 0"
    if above == len(there) or below == len(there):
        return f"{'above' if above else 'below'} 0 on all {len(there)} seeds: every interval excludes 0"
    parts = [f"above 0 on {above}" if above else "", f"below 0 on {below}" if below else ""]
    rest = ": every interval excludes 0" if above + below == len(there) else "; the other intervals include 0"
    return f"{', '.join(part for part in parts if part)} of {len(there)} seeds{rest}"


def _picked(summary: Summary | None, measure: Measure) -> Interval | None:
    return None if summary is None else getattr(summary, measure)


def _mean(summary: Summary | None, measure: Measure) -> float:
    found = _picked(summary, measure)
    return float("nan") if found is None else found.mean


def _size(file: ComparisonFile, name: str) -> str:
    size = file.models.get(name)
    if size is None:
        return "never looks at the picture" if name in ("majority", "question-only") else "baseline"
    parts = []
    if size.parameters:
        parts.append(f"{size.parameters:,} parameters")
    if size.language_model_parameters:
        parts.append(f"{size.language_model_parameters:,} of the language model")
    return ", ".join(parts)


def _scale(cells: Sequence[Interval], least: float, most: float, zero: bool = False) -> Axis:
    low = min([cell.low for cell in cells] + ([0.0] if zero else []))
    high = max([cell.high for cell in cells] + ([0.0] if zero else []))
    room = max(0.05 * (high - low), 0.004)
    return Axis(max(least, low - room), min(most, high + room), MARGIN, WIDTH - MARGIN)


def _ticks(scale: Axis) -> list[float]:
    return [tick / 100 for tick in linear_ticks(100 * scale.low, 100 * scale.high, 5)]


def _gridlines(scale: Axis, zero: float | None, height: float) -> str:
    # Far beyond the picture: the cell, which may be higher, cuts them off, so that they meet those of the next row.
    along = f"-200V{height + 200}"
    lines = [f'<path class="grid" d="M{scale.place(tick):.1f},{along}"/>' for tick in _ticks(scale)]
    if zero is not None:
        lines.append(f'<path class="zero" d="M{scale.place(zero):.1f},{along}"/>')
    return "".join(lines)


def _axis(scale: Axis, zero: float | None) -> Markup:
    labels = "".join(
        f'<text x="{scale.place(tick):.1f}" y="12" text-anchor="middle">'
        f"{'+' if zero is not None and tick > 0 else ''}{number(round(100 * tick, 6))}</text>"
        for tick in _ticks(scale)
    )
    return Markup(f'<svg class="forest" viewBox="0 0 {WIDTH} 16" aria-hidden="true">{labels}</svg>')


def _plot(cells: Sequence[Interval | None], series: int | None, scale: Axis, zero: float | None) -> Markup:
    """Dots and whiskers, a line per seed; its numbers stand in the cells, so readers of text lose nothing."""
    height = LINE * len(cells)
    colour = "base" if series is None else f"s{series}"
    marks: list[str] = []
    for place, cell in enumerate(cells):
        if cell is None:
            continue
        y = LINE * place + LINE / 2
        low, mean, high = (scale.place(value) for value in (cell.low, cell.mean, cell.high))
        marks.append(
            f'<path class="whisker {colour}" d="M{low:.1f},{y - 4}v8M{low:.1f},{y}H{high:.1f}M{high:.1f},{y - 4}v8"/>'
        )
        marks.append(f'<circle class="dot {colour}" cx="{mean:.1f}" cy="{y}" r="4"/>')
    body = _gridlines(scale, zero, height) + "".join(marks)
    return Markup(f'<svg class="forest" viewBox="0 0 {WIDTH} {height}" aria-hidden="true">{body}</svg>')
