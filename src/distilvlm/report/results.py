"""What a comparison found, question set by question set: tables of scores and differences, and samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import intervals
from .curves import Chart, Line, chart
from .formats import ComparisonFile, Interval
from .read import Comparison
from .samples import Kind, choose

WORDY = 60
"""Characters of a mean answer from which samples stand below each other, not in two columns."""


@dataclass(frozen=True)
class Headline:
    """One difference in a sentence."""

    questions: str
    difference: str
    figure: str
    percent: bool  # whether the difference is one of shares
    seed: int  # the first one that has it
    interval: Interval
    verdict: str  # over all seeds


@dataclass(frozen=True)
class QuestionResults:
    """One question set of a comparison."""

    name: str
    title: str
    about: str
    gaps: intervals.Table | None
    closed: intervals.Table | None  # of the gap between control and teacher
    trends: list[Chart]  # the first figure over what some runs differ in
    scores: list[intervals.Table]  # the figure of the differences first
    others: list[intervals.Table]  # further figures, and the first one by kind of question
    same: list[str]  # figures that say the same as the first
    kinds: list[Kind] | None  # None where no answers are kept; empty where nothing was said (perplexity)
    missing: list[str]  # models without an answers file
    asked: int
    shown: int

    @property
    def wordy(self) -> bool:
        """Whether answers need the whole width."""
        given = [one.text for kind in self.kinds or [] for card in kind.cards for a in card.asked for one in a.given]
        return sum(len(text) for text in given) > WORDY * len(given)


def headlines(file: ComparisonFile) -> list[Headline]:
    """The difference that the comparison is about, on every question set where it was measured."""
    pair = main_pair(file)
    name = "" if pair is None else f"{pair[0]} - {pair[1]}"
    found: list[Headline] = []
    for questions, about in file.questions.items():
        cells = [seed.differences.get(questions, {}).get(name) for seed in file.seeds]
        first = next(((seed.seed, cell) for seed, cell in zip(file.seeds, cells, strict=True) if cell), None)
        if first is not None:
            shown = name.replace(" - ", " \u2212 ")
            figure = intervals.figures(file, questions)[0]
            told = (figure.title, figure.percent, *first, intervals.verdict(cells))
            found.append(Headline(about.title or questions, shown, *told))
    return found


def main_pair(file: ComparisonFile) -> tuple[str, str] | None:
    """The two models whose difference the comparison is about: the student with and without its teacher, if named so,
    else the first stated difference of two models, else the last two models."""
    if {"distilled", "control"} <= {*file.models}:
        return "distilled", "control"
    stated = [pair for pair in file.differences if all(name in file.models for name in pair)]
    models = list(file.models)
    return stated[0] if stated else (models[-1], models[-2]) if len(models) > 1 else None


def results(comparison: Comparison, name: str, series: Mapping[str, int], samples: int) -> QuestionResults:
    """The tables and the samples of one question set. Raises ReportError for a damaged answers file."""
    file, about = comparison.file, comparison.file.questions[name]
    scores, others, same = _tables(file, name, dict(series))
    measure = intervals.figures(file, name)[0].name
    answers = comparison.answers(file.seeds[0].seed, name)
    kinds = missing = None
    if answers is not None:
        spoken = any(one.prediction for given in answers.values() for one in given)
        kinds = choose(answers, list(file.models), main_pair(file), series, measure, samples) if spoken else []
        asked = file.seeds[0].rows.get(name, {})  # an encoder alone is asked nothing in words
        missing = [model for model in (*file.baselines, *file.models) if model in asked and model not in answers]
    drawn = next(
        (row.intervals for seed in file.seeds for row in seed.rows.get(name, {}).values() if row.intervals), ""
    )
    pictures = f" about {about.pictures:,} pictures" if about.pictures else ""
    return QuestionResults(
        name=name,
        title=about.title or name,
        about=f"{about.n:,} questions{pictures}" + (f"; 95% intervals: {drawn}" if drawn else ""),
        gaps=intervals.gaps(file, name, dict(series)),
        closed=intervals.closed(file, name, dict(series)),
        trends=_trends(file, name),
        scores=scores,
        others=others,
        same=same,
        kinds=kinds,
        missing=missing or [],
        asked=sum(kind.count for kind in kinds or []),
        shown=sum(kind.shown for kind in kinds or []),
    )


def _trends(file: ComparisonFile, name: str) -> list[Chart]:
    """A chart for each quantity that runs which were asked these questions differ in; a line per seed."""
    figure = intervals.figures(file, name)[0]
    found: list[Chart] = []
    for trend in file.trends:
        lines: list[Line] = []
        for place, seed in enumerate(file.seeds):
            rows = seed.rows.get(name, {})
            cells = {value: rows[run].figures.get(figure.name) for value, run in trend.runs.items() if run in rows}
            points = [(value, cell.mean) for value, cell in sorted(cells.items()) if cell is not None]
            scale = 100 if figure.percent else 1
            lines.append(Line(f"seed {seed.seed}", place % 8, [x for x, _ in points], [scale * y for _, y in points]))
        lines = [line for line in lines if line.x]
        if lines:
            title = f"{figure.title}{' in %' if figure.percent else ''}"
            found.append(chart(title, lines, smooth=False, lines_are="seeds", over=trend.over))
    return found


def _tables(
    file: ComparisonFile, name: str, series: dict[str, int]
) -> tuple[list[intervals.Table], list[intervals.Table], list[str]]:
    """Figures that stand open, figures that are folded, and the titles of those that only repeat the first."""
    figures = intervals.figures(file, name)
    rows = [row for seed in file.seeds for row in seed.rows.get(name, {}).values()]
    categories = dict.fromkeys(category for row in rows for category in row.categories)
    wanted = [(figure, None, figure.headline) for figure in figures]
    wanted += [(figures[0], category, False) for category in categories]
    shown: list[intervals.Table] = []
    folded: list[intervals.Table] = []
    same: list[str] = []
    for figure, category, headline in wanted:
        table = intervals.scores(file, name, figure, series, category)
        if table is None:
            continue
        if headline:
            shown.append(table)
        elif category is None and shown and [r.cells for r in shown[0].rows] == [r.cells for r in table.rows]:
            same.append(figure.title)
        else:
            folded.append(table)
    return shown, folded, same
