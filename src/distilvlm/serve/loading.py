"""An engine of what lies on disk: a model, its adaptors, and how each of them was taught to read."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from distilvlm.data.geometry import Geometry
from distilvlm.data.template import Kind, Template
from distilvlm.evaluate.generate import ends_of, ends_of_text
from distilvlm.models import text_only
from distilvlm.models.adaptors import TEXT, Host, files
from distilvlm.models.save import geometry_of
from distilvlm.models.sources import host_facts, is_local
from distilvlm.models.vlm import VLM

from .interface import ServedModel
from .local import LocalEngine
from .served import Served

log = logging.getLogger(__name__)

GROUNDING = "grounding"
"""What the adaptor of the method that answers with boxes is called."""


def engine(
    model: str | Path,
    adaptors: Mapping[str, str | Path] | None = None,
    *,
    name: str | None = None,
    template: Kind | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    context: int | None = None,
    boxes: Collection[str] = (GROUNDING,),
    places: int = 16,
    queue: int = 64,
) -> LocalEngine:
    """Load a model and decode with it.

    Args:
        model: a checkpoint, a directory of adaptors, or a language model alone, which sees nothing.
        adaptors: workflow → directory of an adaptor, to be added to it.
        name: of a model without adaptors; default: the directory's, or of RUN/model the run's. The workflows of one
            with adaptors are called 'text' and as the adaptors.
        template: how conversations are written; default: as what was saved says. A checkpoint's tokenizer has the
            template that it was trained with.
        context: positions of prompt and answer, if fewer than the model's own.
        boxes: names of models that were taught to answer with boxes.
        places: requests that are decoded together, at most. Keys and values of so many rows of the context's length is
            what the memory must hold.
        queue: requests that wait, at most.

    Raises:
        NotHere, ValueError: as `text_only.load`, and as `adaptors.files.load`.
        DataError: the tokenizer has no chat template, or one that can't be used.
    """
    vlm = text_only.load(model, dtype)
    geometry = geometry_of(model) if vlm.layout.placeholders else "square"
    facts = (host_facts(model) if is_local(str(model)) else None) or {}
    kind: Kind = template or facts.get("template", "chat")
    told: dict[str, tuple[Geometry, Kind]] = {}
    for workflow, place in (adaptors or {}).items():
        host = Host.attach(vlm.model)
        files.load(host, place, workflow)
        extra = files.facts_of(place)["extra"]
        told[workflow] = extra.get("geometry", geometry), template or extra.get("template", kind)
    if vlm.host is not None:
        vlm.host.adaptors.to(dtype)
    vlm.to(device)
    shown = name or called(model)
    return around(vlm, shown, geometry, kind, told, context=context, boxes=boxes, places=places, queue=queue)


def around(
    vlm: VLM,
    name: str,
    geometry: Geometry,
    template: Kind,
    told: Mapping[str, tuple[Geometry, Kind]] | None = None,
    *,
    context: int | None = None,
    boxes: Collection[str] = (GROUNDING,),
    places: int = 16,
    queue: int = 64,
) -> LocalEngine:
    """Decode with a model that is loaded. Arguments and errors as `engine`.

    Args:
        told: workflow → how it was taught, where that is not `geometry` and `template`.
    """
    names = {workflow: workflow for workflow in (TEXT, *vlm.adaptors)} if vlm.adaptors else {TEXT: name}
    served = [
        _served(vlm, workflow, shown, *(told or {}).get(workflow, (geometry, template)), context, shown in boxes)
        for workflow, shown in names.items()
    ]
    for one in served:
        about = f"{one.about.parameters:,} parameters, {one.about.context} positions, template {one.template.kind}"
        log.info("%s: %s", one.about.name, about)
    return LocalEngine(vlm, served, places, queue)


def called(model: str | Path) -> str:
    """What a model without a name is called: its directory's, of RUN/model the run's; a hub id is its own."""
    if not is_local(str(model)):
        return str(model)
    path = Path(model).expanduser().resolve()
    return path.parent.name if path.name == "model" else path.name


def _served(
    vlm: VLM, workflow: str, name: str, geometry: Geometry, kind: Kind, context: int | None, boxes: bool
) -> Served:
    own: int | None = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
    if own is None and context is None:
        raise ValueError(f"'{name}' does not say how many positions it takes: give --context")
    if own is not None and context is not None and context > own:
        raise ValueError(f"'{name}' takes {own} positions, and a context of {context} is asked for: give {own} at most")
    parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    if vlm.host is not None and workflow != TEXT:
        parameters += sum(parameter.numel() for parameter in vlm.host[workflow].parameters())
    written = Template.of(kind, vlm.tokenizer)
    about = ServedModel(name, vlm.layout.placeholders > 0, boxes, context or own or 0, parameters, geometry)
    return Served(about, workflow, written, geometry, vlm.layout, ends_of(written, vlm), ends_of_text(vlm))
