"""Scores with their intervals: rows for the comparison table, each with its dots and whiskers on one common scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from .axes import Axis, linear_ticks, number
from .formats import ComparisonFile, Figure, Interval, Summary

BLIND = ("majority", "question-only", "always-yes")

WIDTH, LINE = 260, 18
MARGIN = 10

RULES = "Accuracy forgives case, articles and punctuation, exact match nothing."
ACCURACY = Figure(name="accuracy", title="accuracy", about=RULES)
EXACT_MATCH = Figure(name="exact_match", title="exact match", about=RULES)
"""What comparisons measured before their files said what they measure."""

Cell = Interval | Literal["undefined", "no gap"] | None
"""None: it was not asked."""


@dataclass(frozen=True)
class Row:
    """One model, or one difference, over all seeds."""

    name: str
    series: int | None  # colour; None for what is no model
    cells: list[Cell]  # one per seed
    plot: Markup
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Models by seeds, or differences by seeds."""

    caption: str
    measure: str  # title of the figure
    about: str
    columns: list[str]  # one per seed
    axis: Markup
    rows: list[Row]
    percent: bool = True  # cells are shares; otherwise numbers as they are


def figures(file: ComparisonFile, questions: str) -> list[Figure]:
    """What was measured on a question set; differences are of the first."""
    told = file.measures.get(file.questions[questions].measure or "")
    if told:
        return told
    first, second = (EXACT_MATCH, ACCURACY) if measured(file, questions) == "exact_match" else (ACCURACY, EXACT_MATCH)
    return [first, second.model_copy(update={"headline": False})]


def scores(
    file: ComparisonFile, questions: str, figure: Figure, series: dict[str, int], category: str | None = None
) -> Table | None:
    """Every baseline and model on one question set, or on one kind of its questions; None if no seed was asked it."""
    asked = [scores.rows.get(questions, {}) for scores in file.seeds]
    names = [name for name in (*file.baselines, *file.models) if any(name in rows for rows in asked)]
    if not names:
        return None
    cells: dict[str, list[Cell]] = {
        name: [_picked(rows.get(name), figure.name, category) for rows in asked] for name in names
    }
    scale = _scale([cell for row in cells.values() for cell in row if isinstance(cell, Interval)], figure.percent)
    rows = [
        Row(name, series.get(name), cells[name], _plot(cells[name], series.get(name), scale), _size(file, name))
        for name in names
    ]
    title = figure.title if category is None else f"{figure.title}, {category}"
    better = "" if figure.better == "neither" else f", {figure.better} is better"
    caption = f"{title}{' in %' if figure.percent else ''}{better}"
    return Table(caption, title, figure.about, _columns(file), _axis(scale), rows, figure.percent)


def gaps(file: ComparisonFile, questions: str, series: dict[str, int]) -> Table | None:
    """Paired differences on one question set, in the order that the comparison states them."""
    given = [scores.differences.get(questions, {}) for scores in file.seeds]
    stated = [f"{a} - {b}" for a, b in file.differences]
    names = [*stated, *(name for found in given for name in found if name not in stated)]
    names = [name for name in dict.fromkeys(names) if any(name in found for found in given)]
    if not names:
        return None
    cells: dict[str, list[Cell]] = {
        name: [(found[name] or "undefined") if name in found else None for found in given] for name in names
    }
    figure = figures(file, questions)[0]
    there = [cell for row in cells.values() for cell in row if isinstance(cell, Interval)]
    scale = _scale(there, figure.percent, zero=0.0)
    rows: list[Row] = []
    for name in names:
        colour = series.get(name.split(" - ")[0])
        drawn = _plot(cells[name], colour, scale)
        rows.append(Row(name.replace(" - ", " − "), colour, cells[name], drawn, verdict(cells[name])))
    lower = ", below 0 is better" if figure.better == "lower" else ""
    points = " in percentage points" if figure.percent else ""
    caption = f"paired differences of {figure.title}{points}{lower}"
    return Table(caption, figure.title, figure.about, _columns(file), _axis(scale), rows, figure.percent)


def closed(file: ComparisonFile, questions: str, series: dict[str, int]) -> Table | None:
    """How much of the teacher's lead over the control each student has made good on one question set."""
    given = [scores.closed.get(questions, {}) for scores in file.seeds]
    names = [name for name in file.models if any(name in found for found in given)]
    if file.roles is None or not names:
        return None
    cells: dict[str, list[Cell]] = {
        name: [(found[name] or "no gap") if name in found else None for found in given] for name in names
    }
    there = [cell for row in cells.values() for cell in row if isinstance(cell, Interval)]
    scale = _scale(there, percent=True, zero=0.0)
    rows = [Row(name, series.get(name), cells[name], _plot(cells[name], series.get(name), scale)) for name in names]
    caption = f"share of the gap from {file.roles.control} to {file.roles.teacher} that is closed, in %"
    return Table(caption, "gap closed", "", _columns(file), _axis(scale), rows)


def _columns(file: ComparisonFile) -> list[str]:
    return [file.column(scores.seed) for scores in file.seeds]


def measured(file: ComparisonFile, questions: str) -> str:
    """Of which figure the differences are: as the file says, else that whose means they are the differences of."""
    told = file.questions[questions].measure
    if told is not None:
        named = file.measures.get(told)
        return named[0].name if named else "exact_match" if told == "exact" else "accuracy"
    for figure in ("exact_match", "accuracy"):
        agree = [
            abs(_mean(rows.get(a), figure) - _mean(rows.get(b), figure) - gap.mean) < 1e-6
            for scores in file.seeds
            for rows in [scores.rows.get(questions, {})]
            for name, gap in scores.differences.get(questions, {}).items()
            for a, _, b in [name.partition(" - ")]
            if a in rows and b in rows and gap is not None
        ]
        if agree and all(agree):
            return figure
    return "accuracy"


def verdict(cells: Sequence[Cell]) -> str:
    """Whether the intervals exclude 0, in words."""
    there = [cell for cell in cells if isinstance(cell, Interval)]
    if not there:
        return "undefined"
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


def _picked(summary: Summary | None, figure: str, category: str | None = None) -> Cell:
    if summary is None:
        return None
    found = summary if category is None else summary.categories.get(category)
    if found is None:
        return None
    return found.figures.get(figure) or "undefined"


def _mean(summary: Summary | None, figure: str) -> float:
    found = _picked(summary, figure)
    return found.mean if isinstance(found, Interval) else float("nan")


def _size(file: ComparisonFile, name: str) -> str:
    size = file.models.get(name)
    if size is None:
        return "never looks at the picture" if name in BLIND else "baseline"
    parts = []
    if size.parameters:
        parts.append(f"{size.parameters:,} parameters")
    if size.language_model_parameters:
        parts.append(f"{size.language_model_parameters:,} of the language model")
    return ", ".join(parts)


@dataclass(frozen=True)
class _Scale:
    """The common scale of a table's rows, and its marks."""

    axis: Axis
    percent: bool
    zero: float | None  # where a line says what no difference is

    def place(self, value: float) -> float:
        return self.axis.place(value)

    @property
    def ticks(self) -> list[tuple[float, float]]:
        """Values, and what is written there."""
        unit = 100 if self.percent else 1
        return [(tick / unit, tick) for tick in linear_ticks(unit * self.axis.low, unit * self.axis.high, 5)]


def _scale(cells: Sequence[Interval], percent: bool, zero: float | None = None) -> _Scale:
    ends = [] if zero is None and cells else [0.0]
    low = min([cell.low for cell in cells] + ends)
    high = max([cell.high for cell in cells] + ends)
    room = max(0.05 * (high - low), 0.004)
    least, most = low - room, high + room
    if percent:  # no room beyond what a share can be; errors relative to another's can be anything
        end = 0.0 if zero is None else -1.0
        least, most = max(min(end, low), least), min(max(1.0, high), most)
    return _Scale(Axis(least, most, MARGIN, WIDTH - MARGIN), percent, zero)


def _gridlines(scale: _Scale, height: float) -> str:
    # Far beyond the picture: the cell, which may be higher, cuts them off, so that they meet those of the next row.
    along = f"-200V{height + 200}"
    lines = [f'<path class="grid" d="M{scale.place(tick):.1f},{along}"/>' for tick, _ in scale.ticks]
    if scale.zero is not None:
        lines.append(f'<path class="zero" d="M{scale.place(scale.zero):.1f},{along}"/>')
    return "".join(lines)


def _axis(scale: _Scale) -> Markup:
    labels = "".join(
        f'<text x="{scale.place(tick):.1f}" y="12" text-anchor="middle">'
        f"{'+' if scale.zero is not None and tick > 0 else ''}{number(round(written, 6))}</text>"
        for tick, written in scale.ticks
    )
    return Markup(f'<svg class="forest" viewBox="0 0 {WIDTH} 16" aria-hidden="true">{labels}</svg>')


def _plot(cells: Sequence[Cell], series: int | None, scale: _Scale) -> Markup:
    """Dots and whiskers, a line per seed; its numbers stand in the cells, so readers of text lose nothing."""
    height = LINE * len(cells)
    colour = "base" if series is None else f"s{series}"
    marks: list[str] = []
    for place, cell in enumerate(cells):
        if not isinstance(cell, Interval):
            continue
        y = LINE * place + LINE / 2
        low, mean, high = (scale.place(value) for value in (cell.low, cell.mean, cell.high))
        marks.append(
            f'<path class="whisker {colour}" d="M{low:.1f},{y - 4}v8M{low:.1f},{y}H{high:.1f}M{high:.1f},{y - 4}v8"/>'
        )
        marks.append(f'<circle class="dot {colour}" cx="{mean:.1f}" cy="{y}" r="4"/>')
    body = _gridlines(scale, height) + "".join(marks)
    return Markup(f'<svg class="forest" viewBox="0 0 {WIDTH} {height}" aria-hidden="true">{body}</svg>')
