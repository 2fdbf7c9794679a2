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
    """The same for a measure of many figures: below each figure a row per evaluation; categories follow.

    `against` names the row that the first one is compared with, paired, in a last column.
    Raises ValueError when it is none of them, or when it asked other questions.
    """
    _check(evaluations, against)
    name, first = next(iter(evaluations.items()))
    measure = first.measure
    caption = f"shares in %; in brackets {_caption(evaluations)}"
    drawn = Table(title=title or None, caption=caption, caption_justify="left", title_justify="left")
    for column in (f"{first.n:,} answers", "of"):
        drawn.add_column(column, overflow="fold")
    drawn.add_column("", justify="right", no_wrap=True)
    if against is not None:
        drawn.add_column(f"minus {against}", justify="right", no_wrap=True)
    for figure in measure.figures:
        gap = "" if against is None else figure.cell(difference(first, evaluations[against], figure.name), "+")
        for who, one in evaluations.items():
            cells = [figure.title if who == name else "", who, figure.cell(one.figures[figure.name])]
            drawn.add_row(*cells, *([] if against is None else [gap if who == name else ""]))
        drawn.add_section()
    main = measure.main
    for category in first.categories:
        shown: dict[str, Figures] = {who: one.categories.get(category, {}) for who, one in evaluations.items()}
        for who, figures in shown.items():
            head = f"{main.title}, {category}" if who == name else ""
            drawn.add_row(head, who, main.cell(figures.get(main.name)))
        drawn.add_section()
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
