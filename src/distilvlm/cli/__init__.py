"""The command line: parse, call the library, print."""

from __future__ import annotations

import logging
import os
import sys

import typer

from distilvlm.errors import is_for_the_user

from . import (
    cache,
    chat,
    checkpoints,
    commands,
    data,
    doctor,
    encoders,
    evaluate,
    export,
    grounding,
    hallucination,
    report,
    serve,
    teach,
    text,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compact vision-language models by distillation.",
)
app.add_typer(commands.app)
app.add_typer(cache.app)
app.add_typer(chat.app)
app.add_typer(checkpoints.app)
app.add_typer(data.app, name="data")
app.add_typer(doctor.app)
app.add_typer(encoders.app)
app.add_typer(evaluate.app)
app.add_typer(export.app)
app.add_typer(grounding.app)
app.add_typer(hallucination.app, name="hallucination")
app.add_typer(report.app)
app.add_typer(serve.app)
app.add_typer(teach.app)
app.add_typer(text.app)


def _configure_logging() -> None:
    from rich.logging import RichHandler

    from distilvlm.runs.console import CONSOLE

    # On a terminal, lines go through the console that draws the progress bar; in a file they are not wrapped.
    rich = RichHandler(console=CONSOLE, show_time=False, show_level=False, show_path=False)
    handler = rich if CONSOLE.is_terminal else logging.StreamHandler()
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("distilvlm").setLevel(logging.INFO if main else logging.WARNING)


def main() -> None:
    """Entry point of the `distilvlm` command."""
    if not {"--help", "-h"} & {*sys.argv}:
        _configure_logging()
    try:
        app()
    except Exception as error:
        if not is_for_the_user(error):
            raise
        typer.secho(f"{type(error).__name__}: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(str(error), err=True)
        sys.exit(1)
