"""Arguments that several commands take, and what each does before it begins."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from distilvlm.runs.stopping import CONTINUE, Stopped, stoppable

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Recipe = Annotated[Path, typer.Argument(help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: stages.0.optim.lr=1e-4, preset=code.")
]


Workflow = Annotated[
    str | None,
    typer.Option(help="Of a directory of adaptors: one's name, or text (none of them); default: the last inserted."),
]

Adaptors = Annotated[
    list[str] | None,
    typer.Option("--adaptor", metavar="NAME=PATH", help="Add the adaptor of a directory as workflow NAME; repeatable."),
]


def adaptor_paths(given: list[str] | None) -> dict[str, str]:
    """NAME=PATH of `--adaptor` as a table. Raises typer.BadParameter."""
    table: dict[str, str] = {}
    for one in given or []:
        name, _, path = one.partition("=")
        if not (name and path):
            raise typer.BadParameter(f"'{one}' is not NAME=PATH", param_hint="--adaptor")
        if name in table:
            raise typer.BadParameter(f"two adaptors are called '{name}': rename one", param_hint="--adaptor")
        table[name] = path
    return table


def quiet_transformers() -> None:
    """Its bars for loading a shard would stand between our own lines."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """For commands that continue where they were stopped: Ctrl-C ends one with 130, a signal to stop with CONTINUE."""
    try:
        with stoppable():
            yield
    except KeyboardInterrupt:
        typer.echo("stopped; the same command continues", err=True)
        raise typer.Exit(130) from None
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(str(stopped), err=True)
        raise typer.Exit(CONTINUE) from None
