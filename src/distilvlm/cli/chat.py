"""`distilvlm chat`: talk with a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Adaptors, adaptor_paths, quiet_transformers

app = typer.Typer()

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint or adaptors: directory or hub id.")],
    adaptor: Adaptors = None,
    picture: Annotated[list[Path] | None, typer.Option(help="Stands before the first question; repeatable.")] = None,
    workflow: Annotated[
        str | None, typer.Option(help="Which of the model's workflows answers first; default: the last.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before all.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; default: until the context ends.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the likeliest token, always.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that have this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn.")] = None,
    template: Annotated[
        Literal["chat", "vicuna", "plain"] | None, typer.Option(help="Default: what the model was saved with.")
    ] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="What weights are held in.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda:1, ...; default: a GPU if there is one.")] = None,
) -> None:
    """Talk with a model: /picture FILE, /model NAME, /reset; Ctrl-C stops an answer.

    Through a pipe every line is a question or a command: answers go to the standard output, all else to the standard
    error, and the exit status is 1 if something could not be answered.
    """
    import torch

    from distilvlm.cost.machine import default_device
    from distilvlm.serve import loading
    from distilvlm.serve.chat import Talk
    from distilvlm.serve.interface import Message, Request

    quiet_transformers()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    engine = loading.engine(
        model,
        adaptor_paths(adaptor),
        template=template,
        dtype=dtype,
        device=device or default_device(),
        places=1,
        queue=1,
    )
    names = [one.name for one in engine.models]
    if workflow is not None and workflow not in names:
        raise typer.BadParameter(f"there is {', '.join(names)}", param_hint="--workflow")
    settings = Request(
        workflow or names[-1],
        () if system is None else (Message("system", system),),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    interactive = sys.stdin.isatty()

    def tell(line: str) -> None:
        typer.secho(line, dim=True, err=True)

    talk = Talk(engine, settings, _say, tell)
    try:
        fine = all([talk.show(str(file)) for file in picture or []])
        if interactive:
            tell(f"{', '.join(names)}; {settings.model} answers. /help says what else there is")
        failed = talk.run(_typed() if interactive else sys.stdin)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        engine.drain(0)
    if not interactive and (failed or not fine):
        raise typer.Exit(1)


def _say(text: str) -> None:
    # What a model writes must not steer a terminal; through a pipe it stays as it is.
    sys.stdout.write(_CONTROL.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _typed() -> Iterator[str]:
    import readline  # noqa: F401 - gives `input` its arrows and its history

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            _say("\n")
            return
