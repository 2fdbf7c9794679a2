"""`distilvlm teach`: a model as a teacher for runs elsewhere."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from .options import Workflow, quiet_transformers

app = typer.Typer()

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@app.command()
def teach(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="LLaVA-style checkpoint or adaptors: directory or id.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all that there are.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8400,
    precision: Annotated[
        Literal["fp32", "bf16", "8bit", "4bit"],
        typer.Option(help="What its weights are held in, as teacher.precision of recipes."),
    ] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda:1, ...; default: a GPU if there is one.")] = None,
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the key that requests must carry; default: none.")
    ] = None,
    largest: Annotated[int, typer.Option(min=1, help="MiB of a request, at most.")] = 256,
    workflow: Workflow = None,
) -> None:
    """Hand out a model's hidden states, so that a run on another machine distils from it as if it were there.

    A recipe names it in its teacher: kind: remote, remote: {url: http://HOST:PORT}. Whoever reaches the port may ask,
    unless a key is wanted; nothing is encrypted. Ctrl-C or SIGTERM ends it when what is under way is answered.
    """
    import torch

    from distilvlm.models.compose import build
    from distilvlm.models.quantised import quantise
    from distilvlm.recipe.models import TeacherSpec
    from distilvlm.teachers import TeacherError
    from distilvlm.teachers.remote import TeachingServer

    quiet_transformers()
    key = None if key_variable is None else os.environ.get(key_variable)
    if key_variable is not None and not key:
        raise TeacherError(f"--key-variable names {key_variable}, which is not set: export it with the key")
    spec = TeacherSpec(**{"from": model, "workflow": workflow, "precision": precision})
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    place = torch.device(device) if device else found or torch.device("cpu")
    vlm = build(spec, seed=0, dtype=torch.bfloat16 if spec.held == "bf16" else torch.float32)
    if spec.bits is not None:
        quantise(vlm, spec.bits, place)
    vlm.to(place)
    try:
        server = TeachingServer(vlm, model, (host, port), key, largest << 20)
    except OSError as error:
        raise TeacherError(f"can't listen at {host}, port {port} ({error}): choose another --port") from None
    if key is None and host not in LOOPBACK:
        typer.echo(f"anybody who reaches {host} may ask this model: --key-variable NAME wants a key", err=True)
    about = server.description
    typer.echo(f"{model} in {about.precision} on {server.device}: {about.fingerprint}")
    typer.echo(f"teaching at {server.url}; a recipe says teacher: {{kind: remote, remote: {{url: {server.url}}}}}")
    server.serve()
    typer.echo("stopped: every request was answered")
