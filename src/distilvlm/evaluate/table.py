"""Evaluations as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from distilvlm.evaluate.measures import Figure
from distilvlm.evaluate.metrics import Interval
from distilvlm.evaluate.report import Evaluation, difference


def as_table(evaluations: Mapping[str, Evaluation], *, against: str | None = None, title: str | None = None) -> Table:
    """One row per evaluation, in order, each figure of their measure with its 95% interval.

    `against` names the row to which the others' main figure is compared, paired, in a last column.
    Raises ValueError when it is none of them, or when it asked other questions.
    """
    _check(evaluations, against)
    measure = next(iter(evaluations.values())).measure
    drawn = Table(title=title, caption=_caption(evaluations), caption_justify="left")
    drawn.add_column("model")
    for column in ("questions", *(figure.title for figure in measure.figures)):
        drawn.add_column(column, justify="right")
    if against is not None:
        drawn.add_column(f"{measure.main.title} against {against}", justify="right")
    for name, evaluation in evaluations.items():
        cells = [name, f"{evaluation.n:,}", *(one.text(evaluation.figures[one.name]) for one in measure.figures)]
        if against is not None:
            cells.append("" if name == against else points(evaluation, evaluations[against]))
        drawn.add_row(*cells)
    return drawn


def figure_table(evaluations: Mapping[str, Evaluation], *, against: str | None = None, title: str = "") -> Table:
    """The same for a measure of many figures: below each figure a row per evaluation; categories follow.

    `against` names the row that the first one is compared with, paired, in a last column.
    Raises ValueError when it is none of them, or when it asked other questions.
    """
    _check(evaluations, against)
    name, first = next(iter(evaluations.items()))
    several = len(evaluations) > 1
    caption = f"shares in %; in brackets {_caption(evaluations)}"
    drawn = Table(title=title or None, caption=caption, caption_justify="left", title_justify="left")
    drawn.add_column(f"{first.n:,} answers")
    if several:
        drawn.add_column("of", overflow="fold")
    drawn.add_column("" if several else name, justify="right", no_wrap=several, overflow="fold")
    if against is not None:
        drawn.add_column(f"minus {against}", justify="right", no_wrap=True)

    def block(head: str, figure: Figure, values: Mapping[str, Interval | None], gap: str = "") -> None:
        for who, value in values.items():
            cells = [head if who == name else "", *([who] if several else []), figure.cell(value)]
            drawn.add_row(*cells, gap if who == name else "") if against is not None else drawn.add_row(*cells)
        if several:
            drawn.add_section()

    for figure in first.measure.figures:
        gap = "" if against is None else figure.cell(difference(first, evaluations[against], figure.name), "+")
        block(figure.title, figure, {who: one.figures[figure.name] for who, one in evaluations.items()}, gap)
    drawn.add_section()
    main = first.measure.main
    for category in first.categories:
        shown = {who: one.categories.get(category, {}).get(main.name) for who, one in evaluations.items()}
        block(f"{main.title}, {category}", main, shown)
    return drawn


def points(a: Evaluation, b: Evaluation) -> str:
    """The paired difference of two main figures in percentage points, with its 95% interval."""
    gap = difference(a, b)
    if gap is None:
        return "undefined"
    return f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"


def _check(evaluations: Mapping[str, Evaluation], against: str | None) -> None:
    if against is not None and against not in evaluations:
        raise ValueError(f"there is no row '{against}' to compare with, only {', '.join(evaluations)}")


def _caption(evaluations: Mapping[str, Evaluation]) -> str:
    by_picture = {evaluation.by_picture for evaluation in evaluations.values()}
    drawn = {True: "pictures", False: "questions"}
    text = f"95% bootstrap intervals over {' or '.join(drawn[kind] for kind in sorted(by_picture))}"
    bad = {name: len(evaluation.bad) for name, evaluation in evaluations.items() if evaluation.bad}
    return text + "".join(f"; {name}: {count} rows left out" for name, count in bad.items())
