"""An adaptor's modules, and making them: of the host's own, of another adaptor's, or of weights that are given.

A copy shares no memory with what it is a copy of, and has none of its hooks: those of a hooked layer would call the
copy's own hooks without end.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from ..sources import require_tensors
from .anatomy import Anatomy, weight_of
from .config import AdaptorConfig
from .precision import FullPrecision, is_plain

_SERIAL = itertools.count(1)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Scale(nn.Module):
    """A gate that is one number, zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight


class Adaptor(nn.Module):
    """Inserted layers and an own embedding, norm, head and projector; each of these is None where the host's is used.

    `gates` is None for structure "c". With tied tables, `lm_head` holds the embedding's weight.
    """

    layers: nn.ModuleList
    gates: nn.ModuleList | None
    embed_tokens: nn.Module | None
    norm: nn.Module | None
    lm_head: nn.Module | None
    projector: nn.Module | None

    def __init__(self, config: AdaptorConfig, layers: nn.ModuleList, **others: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.serial = next(_SERIAL)  # what a cache remembers: a later adaptor may have the name of one that is gone
        self.slot = -1  # of the first inserted layer in a key-value cache
        self.layers = layers
        for name in ("gates", "embed_tokens", "norm", "lm_head", "projector"):
            self.add_module(name, others[name])
        self.tie()
        self.requires_grad_(True)

    def tie(self) -> None:
        """Make the head's weight the embedding's, where the configuration says so."""
        if self.config.tied:
            assert self.embed_tokens is not None and self.lm_head is not None
            self.lm_head.weight = self.embed_tokens.weight

    def place(self, slot: int) -> None:
        """Take the slots of a key-value cache from `slot` on."""
        self.slot = slot
        for number, layer in enumerate(self.layers):
            module: Any
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = slot + number

    def own_state(self) -> dict[str, Tensor]:
        """`state_dict` with a tied table once."""
        state: dict[str, Tensor] = self.state_dict()
        if self.config.tied:
            state.pop("lm_head.weight")
        return state


def from_base(base: Anatomy, config: AdaptorConfig, full_precision: FullPrecision | None = None) -> Adaptor:
    """Copies of the host's modules, gates of zeros: what an adaptor is before it trains (specification §1.3).

    Args:
        full_precision: the base's weights before they were quantised, from which is taken what is quantised.

    Raises:
        ValueError: the host is quantised and they are not given, or they lack a tensor; it has no projector.
    """
    config = resolved(base, config)

    def copied(module: nn.Module, names: list[str], index: int | None = None) -> nn.Module:
        if is_plain(module):
            return own_copy(module)
        if full_precision is None:
            raise ValueError(
                f"the host's {names[0]} is quantised ({type(module).__name__}), and a copy of that could not train: "
                "give the weights from before it was, a directory of safetensors or a state dict: "
                "host.add(..., full_precision=...)"
            )
        made = _plain_twin(module, base, index)
        found = full_precision.tensors(names, list(made.state_dict()), weight_of(base.embed_tokens).dtype)
        made.load_state_dict(found, strict=True, assign=True)
        return made.to(_device(module))

    def layer(position: int) -> nn.Module:
        tail = f"{base.layers_name.rpartition('.')[2]}.{position}"
        names = [f"{base.layers_name}.{position}", f"model.{tail}", f"language_model.model.{tail}", tail]
        return copied(base.layers[position], names, position)

    return _assembled(
        base,
        config,
        [layer(position) for position in config.positions],
        embed_tokens=lambda: copied(base.embed_tokens, ["model.embed_tokens", "embed_tokens"]),
        norm=lambda: copied(base.norm, ["model.norm", "norm"]),
        lm_head=lambda: copied(base.lm_head, ["lm_head"]),
        projector=lambda: own_copy(_projector(base)),
    )


def from_other(base: Anatomy, other: Adaptor, config: AdaptorConfig) -> Adaptor:
    """A copy of another adaptor, which must be of the same form."""
    config = resolved(base, config)
    if config != other.config:
        before, wanted = other.config.to_json(), config.to_json()
        differ = [f"{key}: {before[key]}, not {wanted[key]}" for key in wanted if before[key] != wanted[key]]
        raise ValueError(f"the adaptor to start from is of another form ({'; '.join(differ)})")
    parts = {name: None if module is None else own_copy(module) for name, module in other._modules.items()}
    layers = parts.pop("layers")
    assert isinstance(layers, nn.ModuleList)
    return Adaptor(config, layers, **parts)


def from_state(base: Anatomy, config: AdaptorConfig, state: Mapping[str, Tensor]) -> Adaptor:
    """An adaptor that holds these weights, as `own_state` names them, in their dtypes and on the host's device.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape than the host asks for.
    """
    config = resolved(base, config)
    made = _assembled(
        base,
        config,
        [_skeleton(base.layers[position], base, position) for position in config.positions],
        embed_tokens=lambda: _skeleton(base.embed_tokens, base),
        norm=lambda: _skeleton(base.norm, base),
        lm_head=lambda: _skeleton(base.lm_head, base),
        projector=lambda: _skeleton(_projector(base), base),
    )
    require_tensors("the adaptor", made.own_state(), state, "for this host and form")
    held = dict(state)
    if config.tied:
        held["lm_head.weight"] = held["embed_tokens.weight"]
    made.load_state_dict(held, strict=True, assign=True)
    made.to(_device(base.embed_tokens))
    for layer, position in zip(made.layers, config.positions, strict=True):
        layer.to(_device(base.layers[position]))
    made.tie()
    return made.requires_grad_(True)


def resolved(base: Anatomy, config: AdaptorConfig) -> AdaptorConfig:
    """With `tied` said, for this host. Raises ValueError for positions that the host lacks, or a projector."""
    if config.positions[-1] >= base.depth:
        raise ValueError(f"positions {list(config.positions)} do not fit a host of {base.depth} layers, 0 onwards")
    if config.projector:
        _projector(base)
    tied = base.tied and config.own_embedding and config.own_head if config.tied is None else config.tied
    return replace(config, tied=tied)


def own_copy(module: nn.Module) -> nn.Module:
    """A copy of a module without its hooks, the host that they hold included."""
    return _unhooked(module, {})


def _unhooked(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    held = [(part, name, getattr(part, name)) for part in module.modules() for name in _HOOKS]
    for part in module.modules():  # the model's configuration stays one object: it also says which attention runs
        memo[id(getattr(part, "config", None))] = getattr(part, "config", None)
    try:
        for part, name, hooks in held:
            setattr(part, name, type(hooks)())
        return copy.deepcopy(module, memo)
    finally:
        for part, name, hooks in held:
            setattr(part, name, hooks)


def _skeleton(module: nn.Module, base: Anatomy, index: int | None = None) -> nn.Module:
    """A copy without memory for parameters: they are on the meta device until others take their place."""
    if not is_plain(module):
        return _plain_twin(module, base, index)
    blank = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in module.parameters()}
    return _unhooked(module, dict(blank))


def _plain_twin(module: nn.Module, base: Anatomy, index: int | None) -> nn.Module:
    """What a quantised module would be if it were not, with values that mean nothing."""
    config = copy.deepcopy(base.config)
    vars(config).pop("quantization_config", None)
    with no_init_weights():
        if index is not None:
            kind: Any = type(module)
            twin = kind(config, index).train(module.training)
            for part in twin.modules():
                if hasattr(part, "config"):
                    part.config = base.config
            return twin
        if isinstance(module, nn.Embedding):
            return nn.Embedding(base.vocabulary, base.width)
        return nn.Linear(base.width, base.vocabulary, bias=False)


def _assembled(base: Anatomy, config: AdaptorConfig, layers: list[nn.Module], **parts: Any) -> Adaptor:
    wanted = {
        "embed_tokens": config.own_embedding,
        "norm": config.own_norm,
        "lm_head": config.own_head,
        "projector": config.projector,
    }
    others: dict[str, nn.Module | None] = {name: parts[name]() if own else None for name, own in wanted.items()}
    gates = None if config.structure == "c" else nn.ModuleList(_gate(base, config, p) for p in config.positions)
    return Adaptor(config, nn.ModuleList(layers), gates=gates, **others)


def _gate(base: Anatomy, config: AdaptorConfig, position: int) -> nn.Module:
    with torch.device("meta"):  # nothing is drawn
        gate = Scale() if config.gate == "scalar" else nn.Linear(base.width, base.width)
    gate = gate.to(weight_of(base.embed_tokens).dtype).to_empty(device=_device(base.layers[position]))
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
    return gate


def _device(module: nn.Module) -> torch.device:
    held = next(itertools.chain(module.parameters(), module.buffers()))
    return held.device


def _projector(base: Anatomy) -> nn.Module:
    if base.projector is None:
        raise ValueError("an adaptor with a projector needs a host that sees (a Llava): this one is a language model")
    return base.projector
