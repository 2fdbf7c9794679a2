"""Evaluations as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from distilvlm.evaluate.report import Evaluation, difference


def as_table(evaluations: Mapping[str, Evaluation], *, against: str | None = None, title: str | None = None) -> Table:
    """One row per evaluation, in order, each share with its 95% interval.

    `against` names the row to which the others' accuracy is compared, paired, in a last column.
    Raises ValueError when it is none of them, or when it asked other questions.
    """
    if against is not None and against not in evaluations:
        raise ValueError(f"there is no row '{against}' to compare with, only {', '.join(evaluations)}")
    drawn = Table(title=title, caption=_caption(evaluations), caption_justify="left")
    drawn.add_column("model")
    for column in ("questions", "exact match", "accuracy"):
        drawn.add_column(column, justify="right")
    if against is not None:
        drawn.add_column(f"accuracy against {against}", justify="right")
    for name, evaluation in evaluations.items():
        cells = [name, f"{evaluation.n:,}", str(evaluation.exact_match), str(evaluation.accuracy)]
        if against is not None:
            cells.append("" if name == against else points(evaluation, evaluations[against]))
        drawn.add_row(*cells)
    return drawn


def points(a: Evaluation, b: Evaluation) -> str:
    """The paired difference of two accuracies in percentage points, with its 95% interval."""
    gap = difference(a, b)
    return f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"


def _caption(evaluations: Mapping[str, Evaluation]) -> str:
    by_picture = {evaluation.by_picture for evaluation in evaluations.values()}
    drawn = {True: "pictures", False: "questions"}
    text = f"95% bootstrap intervals over {' or '.join(drawn[kind] for kind in sorted(by_picture))}"
    bad = {name: len(evaluation.bad) for name, evaluation in evaluations.items() if evaluation.bad}
    return text + "".join(f"; {name}: {count} rows left out" for name, count in bad.items())
