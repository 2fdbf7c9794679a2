"""A plan on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from distilvlm.cost import Look, StageCost, as_bytes, as_seconds
from distilvlm.cost.network import Traffic

from .plan import EncoderPlan, ModelPlan, PartCount, Plan, StagePlan


def print_plan(plan: Plan, console: Console) -> None:
    """Print the models, one row per stage, and what each stage costs if that was asked for."""
    console.print(f"[bold]{plan.name}[/]")
    for role, model in (("student", plan.student), ("teacher", plan.teacher)):
        if model is not None:
            console.print(f"{role}: {_model(model)}", highlight=False, soft_wrap=True)
    for encoder in plan.encoders:
        console.print(f"encoder {encoder.name}: {_encoder(encoder)}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "before it", "trains", "data", "samples", "updates", "batch", "rate"):
        right = column in ("samples", "updates", "batch", "rate")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    table.add_column("loss terms: weight × rows per sample", overflow="fold")
    whole = plan.student.parameters
    sizes = [(whole, whole), *((stage.parameters, stage.active) for stage in plan.stages)]
    for stage, before in zip(plan.stages, sizes, strict=False):
        weights = {name: stage.schedule.get(name, f"{weight:g}") for name, weight in stage.loss.items()}
        terms = [f"{name} {weight} × {_rows(stage.rows[name])}" for name, weight in weights.items()]
        terms += [stage.compared_by] if stage.compared_by else []
        table.add_row(
            stage.name,
            "\n".join([*stage.transform, *_size(stage, before)]) or "–",
            "\n".join(_part(part) for part in stage.trains) or "unknown",
            "\n".join(stage.data),
            _number(stage.samples),
            _number(stage.updates),
            f"{stage.batch:,}",
            f"{stage.lr:g}",
            "\n".join(terms),
        )
    console.print(table)
    for stage in plan.stages:
        if stage.network is not None:
            console.print(f"{stage.name}: {_network(stage.network)}", highlight=False, soft_wrap=True)
    if plan.machine is not None:
        _print_costs(plan, console)


def _print_costs(plan: Plan, console: Console) -> None:
    title = f"cost here: {plan.machine}"
    if plan.processes > 1:
        title += f", of each of {plan.processes} processes"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for column in ("stage", "peak memory", "of it", "per update", "of it", "in all", "on disk"):
        table.add_column(column, justify="left" if column in ("stage", "of it") else "right")
    costs = [stage.cost for stage in plan.stages if stage.cost is not None]
    for cost in costs:
        table.add_row(
            cost.stage,
            _known(cost.peak_memory_bytes, as_bytes),
            _parts(cost.memory, as_bytes),
            _known(cost.seconds_per_update, as_seconds),
            _parts(cost.time, as_seconds),
            _known(cost.seconds, as_seconds),
            _disk(cost),
        )
        if cost.look is not None:
            table.add_row(*_look(cost.look))
    console.print()
    console.print(table)
    for note, stages in _notes(costs).items():
        console.print(f"{', '.join(stages)}: {note}", highlight=False, soft_wrap=True)


def _size(stage: StagePlan, before: tuple[int | None, int | None]) -> list[str]:
    """What a transform makes of the student's size, in words; nothing where it stays as it was."""
    if stage.parameters is None or (stage.parameters, stage.active) == before:
        return []
    return [f"→ {stage.parameters:,} parameters,", f"   {stage.active:,} serve a token"]


def _look(look: Look) -> tuple[str, ...]:
    """The line of the teacher's look at the records, below its stage's."""
    records = "its" if look.records is None else f"{look.records:,}"
    return (
        f"  before it: teacher, {records} records once",
        _known(look.peak_memory_bytes, as_bytes),
        "",
        "",
        "",
        _known(look.seconds, as_seconds),
        _known(look.disk_bytes, as_bytes),
    )


def _disk(cost: StageCost) -> str:
    kept = _known(cost.disk_bytes, as_bytes)
    held = cost.disk.get("checkpoints", 0)
    return f"{kept}\n+ {as_bytes(held)} while it runs" if held else kept


def _parts(parts: Mapping[str, float], show: Callable[[float], str]) -> str:
    """The parts that matter, greatest first: those of at least a fiftieth of the whole."""
    least = sum(parts.values()) / 50
    ranked = sorted(parts.items(), key=lambda part: -part[1])
    return "\n".join(f"{name} {show(value)}" for name, value in ranked if value > least)


def _notes(costs: list[StageCost]) -> dict[str, list[str]]:
    notes: dict[str, list[str]] = {}
    for cost in costs:
        for note in cost.notes:
            notes.setdefault(note, []).append(cost.stage)
    return notes


def _known(value: float | None, show: Callable[[float], str]) -> str:
    return "unknown" if value is None else show(value)


def _model(model: ModelPlan) -> str:
    if model.missing is not None:
        return f"{model.source}: not here yet ({model.missing})"
    parts = ", ".join(f"{part.name} {part.parameters:,}" for part in model.parts)
    return f"{model.source}: {model.parameters:,} parameters, {model.visual_tokens} visual tokens ({parts})"


def _encoder(encoder: EncoderPlan) -> str:
    if encoder.grid is None:
        return f"{encoder.source}: not here yet ({encoder.missing})"
    rows, columns = encoder.grid
    kept = "" if encoder.bytes is None else f", {as_bytes(encoder.bytes)} a picture in the cache"
    return f"{encoder.source} at {encoder.size} px, {rows}×{columns} tokens of {encoder.channels:,} channels{kept}"


def _network(one: Traffic) -> str:
    back, head = _known(one.received, as_bytes), _known(one.once, as_bytes)
    once = f", and once its head of {head} to each process" if one.once != 0 else ""
    return f"over the network per update {as_bytes(one.sent)} to the teacher and {back} back{once}"


def _part(part: PartCount) -> str:
    return f"{part.name} {part.parameters:,}"


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _rows(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
