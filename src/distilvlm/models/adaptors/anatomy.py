"""The parts of a host that adaptors copy and stand in for, found in any decoder of Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_LAYERS = ("layers", "h", "blocks")
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass(frozen=True)
class Anatomy:
    """The base's own modules. `projector` and `sees`, the module that has it, are a Llava's."""

    decoder: nn.Module
    layers: nn.ModuleList
    embed_tokens: nn.Module
    norm: nn.Module
    lm_head: nn.Module
    projector: nn.Module | None
    sees: nn.Module | None
    layers_name: str  # in the whole model: 'model.layers'
    config: PretrainedConfig  # of the language model

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        return weight_of(self.embed_tokens).shape[1]

    @property
    def vocabulary(self) -> int:
        return weight_of(self.embed_tokens).shape[0]

    @property
    def tied(self) -> bool:
        return getattr(self.lm_head, "weight", None) is getattr(self.embed_tokens, "weight", None)


def anatomy(model: PreTrainedModel, parts: Mapping[str, str] | None = None) -> Anatomy:
    """Find them, by transformers' own accessors and the usual names.

    Args:
        parts: where a model calls them otherwise: 'decoder', 'layers' or 'norm' -> name in the whole model.

    Raises:
        ValueError: one is not found, with how to name it.
    """
    given = dict(parts or {})
    if unknown := sorted(set(given) - {"decoder", "layers", "norm"}):
        raise ValueError(f"unknown parts {', '.join(unknown)}: decoder, layers and norm can be named")
    decoder: Any = model.get_submodule(given["decoder"]) if "decoder" in given else model.get_decoder()
    layers = _found(model, decoder, "layers", _LAYERS, given)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"the layers of {type(model).__name__} are a {type(layers).__name__}, not a plain ModuleList")
    norm = _found(model, decoder, "norm", _NORMS, given)
    embed_tokens, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    if embed_tokens is None or lm_head is None:
        raise ValueError(f"{type(model).__name__} has no input embedding or no output head: it is no causal LM")
    sees = next((module for module in model.modules() if hasattr(module, "multi_modal_projector")), None)
    projector = None if sees is None else sees.multi_modal_projector
    assert projector is None or isinstance(projector, nn.Module)
    name = next(name for name, module in model.named_modules() if module is layers)
    config = model.config.get_text_config()
    return Anatomy(decoder, layers, embed_tokens, norm, lm_head, projector, sees, name, config)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of an embedding or a linear layer, [rows, columns]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _found(
    model: PreTrainedModel, decoder: nn.Module, part: str, usual: tuple[str, ...], given: Mapping[str, str]
) -> nn.Module:
    if part in given:
        return model.get_submodule(given[part])
    for name in usual:
        if isinstance(module := getattr(decoder, name, None), nn.Module):
            return module
    raise ValueError(
        f"{type(decoder).__name__} has none of {', '.join(usual)}: name it, "
        f"Host.attach(model, parts={{'{part}': 'its.name.in.the.model'}})"
    )
