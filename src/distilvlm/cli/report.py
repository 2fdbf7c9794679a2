"""The command that makes a page of a run or of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import quiet_transformers

app = typer.Typer()


@app.command()
def report(
    dir: Annotated[Path, typer.Argument(metavar="DIR", help="Run directory, or comparison directory.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default DIR/report.html.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Questions shown per question set.")] = 24,
) -> None:
    """Make one self-contained page: stages, curves, table with intervals, answers side by side, masks, hashes."""
    from distilvlm.report import write_report

    quiet_transformers()
    path = write_report(dir, out, samples)
    typer.echo(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
