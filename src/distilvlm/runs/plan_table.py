"""A plan on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .plan import ModelPlan, PartCount, Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Print the models and one row per stage."""
    console.print(f"[bold]{plan.name}[/]")
    for role, model in (("student", plan.student), ("teacher", plan.teacher)):
        if model is not None:
            console.print(f"{role}: {_model(model)}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "before it", "trains", "data", "samples", "updates", "batch", "rate"):
        table.add_column(column, justify="right" if column in ("samples", "updates", "batch", "rate") else "left")
    table.add_column("loss terms: weight × rows per sample")
    for stage in plan.stages:
        terms = [f"{name} {weight:g} × {_rows(stage.rows[name])}" for name, weight in stage.loss.items()]
        table.add_row(
            stage.name,
            "\n".join(stage.transform) or "–",
            "\n".join(_part(part) for part in stage.trains) or "unknown",
            "\n".join(stage.data),
            _number(stage.samples),
            _number(stage.updates),
            f"{stage.batch:,}",
            f"{stage.lr:g}",
            "\n".join(terms),
        )
    console.print(table)


def _model(model: ModelPlan) -> str:
    if model.missing is not None:
        return f"{model.source}: not here yet ({model.missing})"
    parts = ", ".join(f"{part.name} {part.parameters:,}" for part in model.parts)
    return f"{model.source}: {model.parameters:,} parameters, {model.visual_tokens} visual tokens ({parts})"


def _part(part: PartCount) -> str:
    return f"{part.name} {part.parameters:,}"


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _rows(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
