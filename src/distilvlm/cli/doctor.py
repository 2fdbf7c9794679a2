"""`distilvlm doctor`: is this recipe fit to run?"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import Json, Overrides, Recipe, quiet_transformers

app = typer.Typer()


@app.command()
def doctor(
    recipe: Recipe,
    dir: Annotated[Path | None, typer.Option("--dir", help="The run's directory; default runs/NAME.")] = None,
    set: Overrides = None,
    as_json: Json = False,
) -> None:
    """Look for what would go wrong, in seconds: vocabulary, template, rows, parts, loss terms, disk. Trains nothing."""
    from distilvlm.doctor import doctor as examine
    from distilvlm.doctor import print_findings

    quiet_transformers()
    logging.getLogger("distilvlm").setLevel(logging.ERROR)  # the findings say it all
    found = examine(recipe, set or [], dir)
    if as_json:
        typer.echo(json.dumps({"findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        print_findings(found, Console())
    if any(finding.level == "error" for finding in found):
        raise typer.Exit(1)
