"""`distilvlm export`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from .options import Json, quiet_transformers

app = typer.Typer()


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Finished student, or any Llava: directory or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; not there yet.")],
    to: Annotated[
        Literal["hf", "gguf", "onnx"],
        typer.Option(help="hf: transformers, vLLM, SGLang; gguf: llama.cpp; onnx: onnxruntime, transformers.js."),
    ],
    types: Annotated[
        list[str] | None,
        typer.Option("--type", help="Of gguf: f16, q8_0, q4_0; may be given several times. [f16]"),
    ] = None,
    picture: Annotated[
        list[Path] | None, typer.Option(help="What the check shows; may be given several times. [a drawing]")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the check asks about it. [Describe the picture.]")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer in the check, at most.")] = 24,
    as_json: Json = False,
) -> None:
    """Write a student in a form that other programs load, and check that it says the same there.

    The check is written beside the files (parity.json). Where it fails, the files stay, and the exit status is 1.
    """
    from distilvlm.export import export as write
    from distilvlm.export.gguf.writing import Type
    from distilvlm.export.ours import PROMPT

    if types and to != "gguf":
        raise typer.BadParameter("is of --to gguf", param_hint="--type")
    wanted = [kind for kind in get_args(Type) if kind in (types or ["f16"])]
    if unknown := {*(types or [])} - {*wanted}:
        raise typer.BadParameter(f"'{unknown.pop()}' is none of {', '.join(get_args(Type))}", param_hint="--type")
    quiet_transformers()
    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # what is printed says it all
    done = write(
        model,
        to,
        out,
        types=wanted,
        pictures=[str(path) for path in picture or []],
        prompt=PROMPT if prompt is None else prompt,
        tokens=tokens,
    )
    if as_json:
        checks = [check.as_json() for check in done.checks]
        told = {
            "directory": str(out),
            "files": done.files,
            "passed": done.passed,
            "checks": checks,
            "notes": done.notes,
        }
        typer.echo(json.dumps(told, indent=1))
    else:
        typer.echo(f"{out}: {', '.join(done.files)}")
        for line in (line for check in done.checks for line in check.lines()):
            typer.echo(line)
        for note in done.notes:
            typer.echo(f"note: {note}")
    if not done.passed:
        raise typer.Exit(1)
