"""`distilvlm cache`: let a recipe's teacher and encoders see its data once, before any run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .options import Json, Overrides, Recipe, interruptible, quiet_transformers

app = typer.Typer()


@app.command()
def cache(
    recipe: Recipe,
    set: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it takes: records, pictures, bytes, hours.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="That decode pictures; default: one per core, at most 8.")] = None,
    as_json: Json = False,
) -> None:
    """Keep what a recipe's teacher thinks (teacher: {kind: cached}) and what its encoders see (`cache.path`) on disk,
    once per record and picture.

    Says first how much room and time it takes. A fill that was stopped goes on with the same command; several processes
    share one: torchrun --nproc-per-node N --no-python distilvlm cache RECIPE.
    """
    from distilvlm.runs.caching import TEACHER, Filling
    from distilvlm.runs.console import CONSOLE

    quiet_transformers()
    filling = Filling(recipe, set or [])
    main = filling.rank == 0
    if main:
        if as_json:
            content = {"encoders": [asdict(one) for one in filling.expenses]}
            if filling.teacher_expense is not None:
                content |= {"teacher": asdict(filling.teacher_expense)}
            typer.echo(json.dumps(content, indent=1))
        else:
            for line in filling.described():
                typer.echo(line)
    if plan:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with interruptible(), Progress(*columns, console=CONSOLE, disable=not main) as bar:
        names = {one.name: f"encoder {one.name}" for one in filling.expenses}
        names |= {} if filling.teacher_expense is None else {TEACHER: "teacher"}
        tasks = {name: bar.add_task(told, total=None) for name, told in names.items()}
        unreadable = filling.fill(
            min(8, os.cpu_count() or 1) if threads is None else threads,
            lambda name, done, total: bar.update(tasks[name], completed=done, total=total),
        )
    for path, reason in unreadable.items():
        typer.echo(f"{path}: {reason}", err=True)
    if not as_json:
        for line in filling.told():
            typer.echo(line)
