"""`distilvlm cache`: let the encoders of a recipe see its pictures once, before any run."""

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
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it takes: pictures, bytes, hours.")] = False,
    threads: Annotated[int | None, typer.Option(help="That decode pictures; default: one per core, at most 8.")] = None,
    as_json: Json = False,
) -> None:
    """Keep the features of a recipe's encoders on disk (its `cache.path`), once per picture.

    Says first how much room and time it takes. A fill that was stopped goes on with the same command; several processes
    share one: torchrun --nproc-per-node N --no-python distilvlm cache RECIPE.
    """
    from distilvlm.runs.caching import Filling
    from distilvlm.runs.console import CONSOLE

    quiet_transformers()
    filling = Filling(recipe, set or [])
    main = filling.rank == 0
    if main:
        if as_json:
            typer.echo(json.dumps({"encoders": [asdict(one) for one in filling.expenses]}, indent=1))
        else:
            for line in filling.described():
                typer.echo(line)
    if plan:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with interruptible(), Progress(*columns, console=CONSOLE, disable=not main) as bar:
        tasks = {one.name: bar.add_task(f"encoder {one.name}", total=None) for one in filling.expenses}
        unreadable = filling.fill(
            min(8, os.cpu_count() or 1) if threads is None else threads,
            lambda name, done, total: bar.update(tasks[name], completed=done, total=total),
        )
    for path, reason in unreadable.items():
        typer.echo(f"{path}: {reason}", err=True)
