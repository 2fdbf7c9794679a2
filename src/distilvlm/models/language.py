"""A causal language model as Llava can hold it, and cutting one to fewer layers as a student's start."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

UPCYCLED = "upcycled"
"""Entry of a language model's configuration: where its sparse layers come from. Stock loaders keep and ignore it."""


def kept_layers(total: int, layers: int | Sequence[int] | None) -> list[int]:
    """Which of `total` layers stay, ascending.

    A number N keeps N evenly spaced ones, first and last included (1 keeps the first): the rounded i·(total-1)/(N-1).
    A list is taken as it is. None keeps all.

    Raises:
        ValueError: more layers than there are, none, or indices that are out of range, repeated or out of order.
    """
    if layers is None:
        return list(range(total))
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(f"language.layers is {layers}, but the model has {total} layers to keep")
        if layers == 1:
            return [0]
        return [(2 * i * (total - 1) + layers - 1) // (2 * (layers - 1)) for i in range(layers)]
    chosen = list(layers)
    if not chosen or min(chosen) < 0 or max(chosen) >= total:
        raise ValueError(f"language.layers is {chosen}, but the model has layers 0 to {total - 1}")
    if chosen != sorted(set(chosen)):
        raise ValueError(f"language.layers is {chosen}: give every layer once, in ascending order")
    return chosen


def cut_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """A copy of a language model's configuration for the layers `kept` only."""
    total = config.num_hidden_layers
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(kept)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):  # one entry per layer
        values = getattr(config, name, None)
        if isinstance(values, (list, tuple)) and len(values) == total:
            setattr(config, name, [values[index] for index in kept])
    places = {layer: place for place, layer in enumerate(kept)}
    if getattr(config, "mlp_only_layers", None):  # numbers of layers
        config.mlp_only_layers = _renumbered(config.mlp_only_layers, places)
    if (mark := getattr(config, UPCYCLED, None)) is not None:
        setattr(config, UPCYCLED, mark | {"layers": _renumbered(mark["layers"], places)})
    return config


def _renumbered(layers: Sequence[int], places: Mapping[int, int]) -> list[int]:
    return [places[layer] for layer in layers if layer in places]


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """What each layer of a language model is: layers of one kind have the same tensors and do the same work."""
    total = config.num_hidden_layers
    attention = getattr(config, "layer_types", None) or ["attention"] * total
    feed_forward = getattr(config, "mlp_layer_types", None) or ["feed-forward"] * total
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    return [
        f"{attention[layer]}, dense" if layer in dense else f"{attention[layer]}, {feed_forward[layer]}"
        for layer in range(total)
    ]


def cut(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep only these layers of a causal language model, in place, and renumber them.

    Raises ValueError where the layers are not a plain list of blocks.
    """
    body: Any = model.base_model
    total = model.config.num_hidden_layers
    if list(kept) == list(range(total)):
        return
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != total:
        raise ValueError(f"{type(model).__name__} has no plain list of {total} layers: it cannot be cut")
    config = cut_config(model.config, kept)
    body.layers = nn.ModuleList(layers[index] for index in kept)
    for position, layer in enumerate(body.layers):
        block: Any
        for block in layer.modules():
            if isinstance(getattr(block, "layer_idx", None), int):
                block.layer_idx = position  # the slot in the key-value cache
    # The body and its blocks may hold the configuration as an object of their own.
    module: Any
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config = config
    log.info("language model cut from %d to %d layers: %s", total, len(kept), list(kept))


def head_of(lm: PreTrainedModel) -> nn.Linear:
    """The output head of a causal language model."""
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(lm).__name__} has no linear output head, which a stock Llava needs")
    return head


def require_plain_head(lm: PreTrainedModel) -> None:
    """Refuse a model whose logits are not its head's weight times its hidden states, as Llava's are.

    Tried on two tokens rather than looked up: some classes put a bias, a scale or a cap in between.
    """
    body: Any = lm.base_model
    ids = torch.arange(2, device=lm.device).unsqueeze(0)
    with torch.no_grad():
        logits = lm(input_ids=ids, use_cache=False).logits
        plain = body(input_ids=ids, use_cache=False).last_hidden_state @ head_of(lm).weight.T
    if not torch.allclose(logits.float(), plain.float(), rtol=1e-2, atol=1e-2 * logits.abs().max().item()):
        raise ValueError(
            f"{type(lm).__name__} cannot be the language model of a stock Llava: its logits are not its head's weight "
            "times its hidden states (a bias, a scale or a cap comes in between), and Llava's are"
        )
