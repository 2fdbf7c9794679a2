"""`distilvlm serve`: models behind OpenAI's API, and a page to talk with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Adaptors, adaptor_paths, quiet_transformers

app = typer.Typer()


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Checkpoint or directory of adaptors; NAME=MODEL gives it a name. Several: each a base of its own.",
        ),
    ],
    adaptor: Adaptors = None,
    boxes: Annotated[
        list[str] | None, typer.Option(help="NAME of a model that answers with boxes; default: grounding.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all that there are.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="DISTILVLM_API_KEY", help="What requests must carry; the variable keeps it out of `ps`."),
    ] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Listen elsewhere than on loopback although no key is wanted.")
    ] = False,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="https://SITE whose pages may ask (CORS). May be repeated.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="HOST or HOST:PORT that pictures may be fetched from; default: nothing is fetched."),
    ] = None,
    template: Annotated[
        Literal["chat", "vicuna", "plain"] | None, typer.Option(help="Default: what each model was saved with.")
    ] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="What weights are held in.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda:1, ...; default: a GPU if there is one.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Positions of prompt and answer, if fewer than the model's own.")
    ] = None,
    places: Annotated[int, typer.Option(min=1, help="Requests that are decoded together, at most.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait, at most; more get a 429.")] = 64,
    largest: Annotated[int, typer.Option(min=1, help="MiB of a request, an upload or a fetched picture.")] = 32,
    pixels: Annotated[int, typer.Option(min=1, help="Million pixels of a picture, at most.")] = 25,
    pictures: Annotated[int, typer.Option(min=0, help="Pictures of a request, at most.")] = 8,
    uploads: Annotated[int, typer.Option(min=0, help="MiB of all uploads together, kept in memory.")] = 256,
    kept: Annotated[float, typer.Option(min=1, help="Seconds that an upload is kept.")] = 3600,
    draining: Annotated[float, typer.Option(min=0, help="Seconds for answers under way when told to stop.")] = 30,
) -> None:
    """Answer as OpenAI's API does: chat, completions, models, uploads; with a page at / to talk with the models.

    A model with adaptors is served once, and each of its workflows has a name: text, and as its adaptors are called.
    It listens on loopback; elsewhere it wants a key. Ctrl-C or SIGTERM ends it when what is under way is answered.
    """
    import torch

    try:
        from distilvlm.serve.app import application
        from distilvlm.serve.server import Server, is_loopback, require_safe
        from distilvlm.serve.settings import MIB, Settings
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error.name} is not here: pip install 'distilvlm[serve]'") from None
    from distilvlm.cost.machine import default_device
    from distilvlm.serve import loading

    if api_key == "":
        raise typer.BadParameter("the key is empty: give one, or unset DISTILVLM_API_KEY")
    settings = Settings(
        key=api_key,
        loopback=is_loopback(host),
        origins=tuple(allow_origin or ()),
        largest=largest * MIB,
        held=max(256, 2 * largest) * MIB,
        pixels=pixels * 1_000_000,
        pictures=pictures,
        uploads=uploads * MIB,
        kept=kept,
        hosts=frozenset(allow_host or ()),
        draining=draining,
    )
    require_safe(host, settings, without_key)
    quiet_transformers()
    engines = []
    for number, given in enumerate(models):
        name, place = _named(given)
        engines.append(
            loading.engine(
                place,
                adaptor_paths(adaptor) if number == 0 else None,
                name=name,
                template=template,
                dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
                device=device or default_device(),
                context=context,
                boxes=boxes if boxes is not None else (loading.GROUNDING,),
                places=places,
                queue=queue,
            )
        )
    server = Server(application(engines, settings), host, port)
    if without_key and api_key is None and not settings.loopback:
        typer.echo(f"anybody who reaches {host} may use this server", err=True)
    typer.echo(f"serving {', '.join(server.desk.models)} at {server.url}: the API at {server.url}/v1, a page at /")
    server.run()
    typer.echo("stopped")


def _named(given: str) -> tuple[str | None, str]:
    """NAME=MODEL, or a model that has its own name; a path with = in it is one if it is there."""
    name, equals, place = given.partition("=")
    if not equals or Path(given).exists():
        return None, given
    if not (name and place):
        raise typer.BadParameter(f"'{given}' is not NAME=MODEL")
    return name, place
