"""Models by benchmarks in one table, what each model is and costs, and quality against size and training cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import intervals
from .formats import Answering, ComparisonFile, Figure, Interval, ModelFacts
from .scatter import Point, Scatter, scatter
from .wording import duration, share

Quantity = Callable[[ModelFacts], float | None]

AGAINST: dict[str, tuple[Quantity, Callable[[float], str]]] = {
    "parameters that serve a token": (lambda facts: facts.active_parameters or facts.parameters, "{:,.0f}".format),
    "training (seconds in updates)": (lambda facts: facts.training_seconds, duration),
}
"""What quality is drawn against, and how its values read."""


@dataclass(frozen=True)
class Column:
    """One question set of the table."""

    title: str
    figure: str  # its main one, with the side that is better where that is not the higher one


@dataclass(frozen=True)
class Cell:
    """One model on one question set, over all seeds."""

    score: str  # '' where it was not asked
    best: bool  # of the models, by the mean
    closed: str  # of the gap between control and teacher; '' where nothing is to be told


@dataclass(frozen=True)
class Row:
    name: str
    series: int | None
    facts: ModelFacts | None  # None: a baseline
    cells: list[Cell]


@dataclass(frozen=True)
class Overview:
    columns: list[Column]
    rows: list[Row]
    charts: list[Scatter]
    machines: list[str]  # where speed and memory were measured, and how
    counted: bool  # whether there is anything to tell of the models beside their scores
    together: int  # answers at a time of the second speed; 0 where none was measured


def overview(file: ComparisonFile, series: Mapping[str, int]) -> Overview:
    """All of a comparison at a glance. With several seeds a cell is their mean, and in brackets the lowest and the
    highest of them; with one its interval."""
    figures = {questions: intervals.figures(file, questions)[0] for questions in file.questions}
    columns = [
        Column(
            file.questions[questions].title or questions,
            figure.title
            + (" in %" if figure.percent else "")
            + (" (lower is better)" if figure.better == "lower" else ""),
        )
        for questions, figure in figures.items()
    ]
    rows: list[Row] = []
    for name in (*file.baselines, *file.models):
        cells = [_cell(file, questions, figure, name) for questions, figure in figures.items()]
        if any(cell.score for cell in cells) or name in file.models:
            rows.append(Row(name, series.get(name), file.models.get(name), cells))
    answering = [facts.answering for facts in file.models.values() if facts.answering is not None]
    charts = [
        chart
        for over, (quantity, reading) in AGAINST.items()
        for questions, figure in figures.items()
        if (chart := _chart(file, questions, figure, series, over, quantity, reading)) is not None
    ]
    return Overview(
        columns=columns,
        rows=rows,
        charts=charts,
        machines=list(dict.fromkeys(_measured(one) for one in answering)),
        counted=any(facts.parameters or facts.answering for facts in file.models.values()),
        together=answering[0].together if answering else 0,
    )


def _cell(file: ComparisonFile, questions: str, figure: Figure, name: str) -> Cell:
    found = _scores(file, questions, figure, name)
    closed = [seed.closed[questions].get(name) for seed in file.seeds if name in seed.closed.get(questions, {})]
    there = [one for one in closed if one is not None]
    told = f"{share(_over_seeds(there))}% of the gap" if there else "no gap to close" if closed else ""
    if not found:
        return Cell("", False, told)
    best = name in file.models and _mean(found) == _best(file, questions, figure)
    return Cell(share(_over_seeds(found), figure.percent), best, told)


def _scores(file: ComparisonFile, questions: str, figure: Figure, name: str) -> list[Interval]:
    rows = [seed.rows.get(questions, {}).get(name) for seed in file.seeds]
    found = [row.figures.get(figure.name) for row in rows if row is not None]
    return [one for one in found if one is not None]


def _best(file: ComparisonFile, questions: str, figure: Figure) -> float | None:
    """The best model's mean; None where there is no better side, or nobody to be better than."""
    means = [_mean(found) for name in file.models if (found := _scores(file, questions, figure, name))]
    if figure.better == "neither" or len(means) < 2:
        return None
    return max(means) if figure.better == "higher" else min(means)


def _over_seeds(found: Sequence[Interval]) -> Interval:
    if len(found) == 1:
        return found[0]
    means = [one.mean for one in found]
    return Interval(mean=_mean(found), low=min(means), high=max(means))


def _mean(found: Sequence[Interval]) -> float:
    return sum(one.mean for one in found) / len(found)


def _chart(
    file: ComparisonFile,
    questions: str,
    figure: Figure,
    series: Mapping[str, int],
    over: str,
    quantity: Quantity,
    reading: Callable[[float], str],
) -> Scatter | None:
    """None where fewer than two models have the quantity: then nothing is to be seen."""
    unit = 100 if figure.percent else 1
    points = [
        Point(name, series[name], x, [(unit * one.mean, unit * one.low, unit * one.high) for one in found], reading(x))
        for name, facts in file.models.items()
        if (x := quantity(facts)) is not None and (found := _scores(file, questions, figure, name))
    ]
    if len({point.x for point in points}) < 2:
        return None
    title = file.questions[questions].title or questions
    return scatter(f"{title}: {figure.title}{' in %' if figure.percent else ''}", points, over)


def _measured(one: Answering) -> str:
    how = f"{one.tokens} new tokens behind a picture and a short question, {one.precision}"
    return ", ".join(part for part in (one.machine, one.date, how) if part)
