"""Commands that make one checkpoint out of another."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import Json, quiet_transformers

app = typer.Typer()
convert = typer.Typer(no_args_is_help=True, help="Bring other projects' checkpoints into stock form; one per format.")
app.add_typer(convert, name="convert-checkpoint")

Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; not there yet.")]


@app.command()
def upcycle(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Dense Llava or language model: directory or hub id.")],
    out: Out,
    experts: Annotated[int, typer.Option(min=1, help="Copies of a sparse layer's feed-forward.")] = 4,
    top_k: Annotated[int, typer.Option(min=1, help="How many of them serve a token.")] = 2,
    layers: Annotated[
        str, typer.Option(help="even (0, 2, 4, ...), odd, first_half, second_half, all, or numbers: 0,2,5.")
    ] = "even",
    seed: Annotated[int, typer.Option(help="Of the routers.")] = 0,
    teacher: Annotated[str | None, typer.Option(help="Another checkpoint, to be measured beside the two.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens that the measurement reads.")] = 256,
    new: Annotated[int, typer.Option(min=1, help="Tokens that it writes.")] = 64,
    as_json: Json = False,
) -> None:
    """Make a dense model sparse: several experts in chosen layers, the same function until something trains.

    Checks the written checkpoint against the dense one, then measures both: parameters, speed, memory.
    """
    from distilvlm.cost import this_machine
    from distilvlm.cost.serving import serving, serving_table
    from distilvlm.models.sparse_checkpoint import Probe, require_same, stock, upcycle_checkpoint

    quiet_transformers()
    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # what is printed says it all
    upcycle_checkpoint(model, out, experts, top_k, _layers(layers), seed)
    measured = {}
    probes = {}
    for name, source in {"dense": model, "sparse": str(out)}.items():
        loaded = stock(source)
        measured[name] = serving(loaded, prompt, new)
        probes[name] = Probe.of(loaded)
        del loaded
    difference = require_same(probes["dense"], probes["sparse"], out)
    if teacher is not None:
        measured["teacher"] = serving(stock(teacher), prompt, new)
    if as_json:
        told = {"difference": difference, "largest_logit": probes["dense"].largest, "machine": this_machine()}
        told |= {"models": {name: asdict(one) for name, one in measured.items()}}
        typer.echo(json.dumps({"model": model, "out": str(out), **told}, indent=1))
        return
    largest = probes["dense"].largest
    typer.echo(f"{out}: sparse, and the same function: max |Δlogit| {difference:.1e}, of logits up to {largest:.1f}")
    Console().print(serving_table(measured, this_machine()))


@convert.command("llava-mod")
def llava_mod(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Directory that LLaVA-MoD's code wrote.")],
    out: Out,
    vision: Annotated[
        str | None, typer.Option(help="The vision encoder: directory or hub id; default: what config.json names.")
    ] = None,
) -> None:
    """LLaVA-MoD's own checkpoints, dense or sparse, as stock Llavas.

    Reads safetensors, or pytorch_model*.bin: pickled files, of which only tensors are taken (weights_only), so that
    nothing in them runs. Beside move-kd, no other command reads pickled weights.
    """
    from distilvlm.data.template import export_chat_template
    from distilvlm.models.files import require_free
    from distilvlm.models.llava_mod import load
    from distilvlm.models.save import save

    quiet_transformers()
    require_free(out)
    vlm, geometry = load(checkpoint, vision)
    save(vlm, out, geometry, export_chat_template("vicuna", vlm.tokenizer))
    typer.echo(f"{out}: pictures are '{geometry}', the template is 'vicuna', as LLaVA-MoD's code has them")


@convert.command("iaa")
def iaa(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Directory of the method's own repository.")],
    out: Out,
    vision: Annotated[
        str | None, typer.Option(help="The vision encoder: directory or hub id; default: what config.json names.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Layers that others are inserted behind: 3,7,11; default: the published list.")
    ] = None,
) -> None:
    """IAA's own checkpoints: OUT/base, a stock Llava, and OUT/adaptors, 'multimodal' and 'grounding' on it.

    Reads safetensors only. OUT/adaptors is a model for every command that takes one, with --workflow NAME; it names the
    base by its place.
    """
    from distilvlm.models.adaptors.published import convert

    quiet_transformers()
    chosen = None if positions is None else _layers(positions)
    if isinstance(chosen, str):
        raise typer.BadParameter(f"'{positions}' is no list of layers such as 3,7,11", param_hint="--positions")
    host = convert(checkpoint, out, vision, chosen).host
    assert host is not None
    typer.echo(f"{out / 'base'}: the frozen model")
    for name in host.names:
        typer.echo(f"{out / 'adaptors' / name}: behind layers {', '.join(map(str, host[name].config.positions))}")


@convert.command("move-kd")
def move_kd(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Directory that MoVE-KD's code wrote.")],
    out: Out,
    vision: Annotated[
        str | None, typer.Option(help="The CLIP it is built on: directory or hub id; default: what config.json names.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Of its experts, as it was trained.")] = 1.0,
) -> None:
    """The vision tower of MoVE-KD's own checkpoints, with its experts, as an encoder for vision.from of a recipe.

    Reads safetensors, or pytorch_model*.bin and mole_encoder.bin: pickled files, of which only tensors are taken.
    """
    from distilvlm.models.encoder_directory import save_encoder
    from distilvlm.models.files import require_free
    from distilvlm.models.move_kd import load

    quiet_transformers()
    require_free(out)
    encoder, geometry = load(checkpoint, vision, alpha)
    save_encoder(encoder.model.tower, encoder.layout, out, geometry)
    typer.echo(f"{out}: hidden state {encoder.layout.layer} is read, pictures are '{geometry}'")


def _layers(text: str) -> str | list[int]:
    pieces = [piece.strip() for piece in text.split(",")]
    return [int(piece) for piece in pieces] if all(piece.isdecimal() for piece in pieces) else text
