"""`distilvlm data`: convert what people have, look at what a recipe trains on."""

from __future__ import annotations

import typer

from . import convert

app = typer.Typer(no_args_is_help=True, help="Convert, check and count training data.")
app.add_typer(convert.app, name="convert")
