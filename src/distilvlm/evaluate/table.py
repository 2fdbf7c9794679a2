"""Evaluations as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from distilvlm.evaluate.report import Evaluation, Figures, difference


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
    """The same for a measure of many figures: one column per evaluation, one row per figure, categories below.

    `against` names the column to which the first one is compared, paired, in a last column.
    Raises ValueError when it is none of them, or when it asked other questions.
    """
    _check(evaluations, against)
    first = next(iter(evaluations.values()))
    caption = f"shares in %; in brackets {_caption(evaluations)}"
    drawn = Table(title=title or None, caption=caption, caption_justify="left", title_justify="left")
    drawn.add_column(f"{first.n:,} answers")
    for name in evaluations:
        drawn.add_column(name, justify="right", overflow="fold")
    if against is not None:
        drawn.add_column(f"against {against}", justify="right")
    for figure in first.measure.figures:
        cells = [figure.title, *(figure.cell(one.figures[figure.name]) for one in evaluations.values())]
        if against is not None:
            cells.append(figure.cell(difference(first, evaluations[against], figure.name), "+"))
        drawn.add_row(*cells)
    main = first.measure.main
    if first.categories:
        drawn.add_section()
    for category in first.categories:
        shown: list[Figures] = [one.categories.get(category, {}) for one in evaluations.values()]
        cells = [f"{main.title}, {category}", *(main.cell(figures.get(main.name)) for figures in shown)]
        drawn.add_row(*cells)
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
