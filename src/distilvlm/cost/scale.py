"""A model's scale model: a few blocks of each kind at full width, of real tensors or of ones without memory.

A layer always fits, so what a whole model costs can be found on a machine that cannot hold it. A language model may
have layers of several kinds (a sparse student has two); `lines` says which few of them tell of all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from distilvlm.models import parts, routing
from distilvlm.models.adaptors import Host
from distilvlm.models.alone import Alone
from distilvlm.models.language import cut_config, layer_kinds
from distilvlm.models.stages import Choosing
from distilvlm.models.vlm import VLM, on_meta

Make = Callable[[Tensor], Tensor]
"""A tensor of the meta device -> one of its shape and dtype."""


Lines = list[tuple[list[int], float]]
"""Layers to keep, and how often their cost counts: the sum over all entries is the whole model's."""


def depth(vlm: VLM) -> tuple[int, int]:
    """Blocks of the language model and of the vision tower (all of them run, the unread ones too)."""
    config = vlm.model.config
    return config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers  # pyright: ignore


def lines(vlm: VLM, least: int) -> Lines:
    """What is to be run to learn the cost of all language layers, which grows in a straight line with every layer of a
    kind: the smallest cut first.

    The layers are taken in rounds of one of each kind, as long as a kind has some left. The first rounds, of at least
    `least` layers, are the base; each further sort of round is run once on top of it.
    """
    by_kind: dict[str, list[int]] = {}
    extended = inserted(vlm)
    for layer, kind in enumerate(layer_kinds(vlm.model.config.text_config)):  # pyright: ignore
        by_kind.setdefault(f"{kind}, and an inserted one" if layer in extended else kind, []).append(layer)
    rounds = [
        [members[place] for members in by_kind.values() if place < len(members)]
        for place in range(max(map(len, by_kind.values())))
    ]
    base: list[int] = []
    while rounds and len(base) < least:
        base += rounds.pop(0)
    found: Lines = [(sorted(base), 1.0)]
    for _, alike in groupby(rounds, key=len):
        first, *others = alike
        count = 1.0 + len(others)
        found[0] = (found[0][0], found[0][1] - count)
        found.append((sorted(base + first), count))
    return found


def inserted(vlm: VLM) -> tuple[int, ...]:
    """The layers of the language model that an inserted one of the active adaptor belongs to."""
    name = parts.active_adaptor(vlm.model)
    return () if name is None or vlm.host is None else vlm.host[name].config.positions


def scale_model(
    vlm: VLM,
    language: Sequence[int],
    vision: int,
    make: Make,
    dtype: torch.dtype = torch.float32,
    choosing: Choosing = ("argmax", None),
) -> VLM:
    """A Llava like `vlm` whose every tensor was made by `make`; `vlm` is only read.

    Nothing is drawn or loaded: values are the maker's. Tied weights stay one tensor. Of adaptors, the active one is
    there, with the layers that belong to those kept.

    Args:
        language: the layers of the language model that stay.
        vision: blocks of the tower.
        choosing: of a sparse model's routers.
    """
    config = copy.deepcopy(vlm.model.config)
    config.text_config = cut_config(config.text_config, language)  # pyright: ignore
    config.vision_config.num_hidden_layers = vision  # pyright: ignore
    config.vision_feature_layer = -1
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = LlavaForConditionalGeneration(config)
    if (adapters := getattr(vlm.model, "adapters", None)) is not None:
        model.adapters = on_meta(adapters)
    made: dict[int, Tensor] = {}
    scaled = VLM(model, vlm.tokenizer, replace(vlm.layout, layer=-1), vlm.image_id)
    if (name := parts.active_adaptor(vlm.model)) is not None and vlm.host is not None:
        places = tuple(place for place, layer in enumerate(language) if layer in inserted(vlm))
        # Where none of the layers kept has one, what is looked at is not the language model's layers.
        Host.attach(model).add(name, replace(vlm.host[name].config, positions=places or (0,)))
        scaled.use(name)
    for module in (module for tree in scaled.trees for module in tree.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(make(parameter.detach().to(dtype)))
                module._parameters[name] = made[id(parameter)]  # pyright: ignore
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = make(buffer)
    routing.install(model, *choosing)
    return scaled.train(False)


def filled(device: torch.device) -> Make:
    """A maker of real tensors with small values that no generator draws: time does not depend on them."""
    pattern = torch.sin(torch.arange(65_536, dtype=torch.float32)).mul_(0.02)

    def make(like: Tensor) -> Tensor:
        if not like.is_floating_point():  # position ids
            return torch.arange(like.shape[-1], device=device).to(like.dtype).expand(like.shape).clone()
        repeats = -(-like.numel() // pattern.numel())
        flat = pattern.to(like.dtype).repeat(repeats)[: like.numel()]
        return flat.view(like.shape).to(device)

    return make


def trained(model: LlavaForConditionalGeneration | Alone, names: Sequence[str]) -> dict[str, dict[str, nn.Parameter]]:
    """Part -> name -> parameter of what a stage trains, each under its closest name; changes nothing and logs nothing.

    Raises ValueError for an unknown or empty part.
    """
    # A plan may lack encoders, and so the adapters to them.
    names = [name for name in names if name != "adapters" or getattr(model, "adapters", None) is not None]
    never = {name for leaf, members in parts.by_leaf(model).items() if leaf in parts.NEVER for name in members}
    owner: dict[str, str] = {}
    for part in sorted(names, key=len):
        owner |= dict.fromkeys(parts.parameters_of(model, part).keys() - never, part)
    everything = parts.named(model)
    return {part: {n: everything[n] for n in everything if owner.get(n) == part} for part in names}


def train_only(model: LlavaForConditionalGeneration | Alone, members: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    parts.freeze(model)
    for parameters in members.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Inside, gradients are on and may be made; outside, the random generators are as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        yield
