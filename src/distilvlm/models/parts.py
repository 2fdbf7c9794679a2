"""The names of a student's parts, and choosing which of them train.

`vision`, `projector`, `language`; below vision: `.experts` and `.router` of a tower with a mixture; below language:
`.embedding` (with a tied head), `.head` (an untied one), `.attention`, `.feed_forward` (experts, too), `.router`,
`.norm`, and `.other` where a model has more; `adapters` stand between the student and encoders that teach it, while it
trains. Two parts never train: `vision.unread` are the blocks and heads behind the layer that is read, which never
receive a gradient; `language.unused` is the shared expert of zeros that an upcycled model has because its class wants
one.

A model with adaptors has `adaptor`, the active one: `.projector`, `.embedding`, `.layers`, `.gates`, `.norm`, `.head`.
The others are `adaptor.idle`. Beside adaptors nothing trains.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from .adaptors import TEXT, Host
from .alone import Alone
from .towers import blocks_of
from .upcycling import active_parameters, upcycled_layers

log = logging.getLogger(__name__)

Model = LlavaForConditionalGeneration | Alone

Parameters = dict[str, nn.Parameter]
"""Name in the whole model → parameter, in the model's order."""

LEAVES = (
    "vision",
    "vision.experts",
    "vision.router",
    "vision.unread",
    "projector",
    "language.embedding",
    "language.head",
    "language.attention",
    "language.feed_forward",
    "language.router",
    "language.norm",
    "language.other",
    "language.unused",
    "adaptor.projector",
    "adaptor.embedding",
    "adaptor.layers",
    "adaptor.gates",
    "adaptor.norm",
    "adaptor.head",
    "adaptor.idle",
    "adapters",
)
"""Every parameter belongs to exactly one of these. 'vision' stands here for what is read of the tower, less experts."""

NEVER = {
    "vision.unread": "lies behind the layer that is read (vision.layer)",
    "language.unused": "is the shared expert of zeros of an upcycled model, which must stay zero",
    "adaptor.idle": "are the adaptors that are not active",
}
"""Parts that never train, and why."""

ADAPTORS = "adaptors."
"""Beginning of the names of adaptors' parameters, which are not the stock model's: `adaptors.NAME.layers.0....`"""

_OF_AN_ADAPTOR = {
    "projector": "projector",
    "embed_tokens": "embedding",
    "layers": "layers",
    "gates": "gates",
    "norm": "norm",
    "lm_head": "head",
}

_MADE_BY = {
    "language.router": ": only a sparse model has routers (transform: [{do: upcycle}])",
    "adaptor.gates": ": only structures a and b have gates",
    "vision.experts": ": only a tower with a mixture has experts (transform: [{do: mix}])",
    "vision.router": ": only a tower with a mixture of several experts has routers (transform: [{do: mix}])",
    "adapters": ": a stage with loss.encoder has them, for teachers other than the anchor",
    "projector": ": the student is a vision encoder alone",
    "language": ": the student is a vision encoder alone",
}
"""Why a part may be empty."""

_LANGUAGE_KINDS = (
    ("attention", re.compile(r"attn|attention|mixer")),
    ("feed_forward", re.compile(r"mlp|feed_?forward|ffn|moe")),
    ("norm", re.compile(r"norm")),
)


@dataclass(frozen=True)
class PartRow:
    """A line of the table of parts."""

    name: str
    parameters: int  # numbers, not tensors
    trainable: int
    dtype: str  # of the parameters; several are joined by '+'


@dataclass(frozen=True)
class Trainable:
    """What a stage trains."""

    parameters: dict[str, Parameters]  # part, as the stage named it → its parameters; each under its closest name
    table: list[PartRow]


def choose(model: Model, names: Sequence[str]) -> Trainable:
    """Freeze everything, then let the named parts train, held in float32; what is frozen keeps its dtype.

    A parameter that two names cover (`language`, `language.head`) belongs to the closer one.

    Raises:
        ValueError: an unknown name (with the nearest known one), a part that is empty, or one that cannot train.
    """
    parts = _leaves(model)
    chosen: dict[str, list[str]] = {}
    for name in names:
        require_trainable(model, name, parts)
        chosen[name] = [leaf for leaf in LEAVES if leaf not in NEVER and _covers(name, leaf)]
    closest = {leaf: max((n for n in chosen if leaf in chosen[n]), key=len, default=None) for leaf in LEAVES}

    freeze(model)
    trains: dict[str, set[str]] = {name: set() for name in chosen}
    for leaf, members in parts.items():
        if (name := closest[leaf]) is None:
            continue
        trains[name] |= members.keys()
        for parameter in members.values():
            # bf16 weights hardly move: at 2e-5, 4% of them changed in 5 AdamW steps where all do in float32.
            parameter.data = parameter.data.to(torch.float32)
            parameter.requires_grad_(True)
    everything = named(model)
    parameters = {
        name: {key: parameter for key, parameter in everything.items() if key in members}
        for name, members in trains.items()
    }
    table = summary(model)
    for row in table:
        state = "frozen" if not row.trainable else f"{row.trainable:,} train"
        log.info("part %-22s %15s parameters, %s, %s", row.name, f"{row.parameters:,}", row.dtype, state)
    return Trainable(parameters=parameters, table=table)


def named(model: Model) -> Parameters:
    """All parameters by name, those of adaptors behind the stock model's own. Shared ones stand there once."""
    host = Host.of(model)
    own = dict(model.named_parameters())
    return own if host is None else own | {ADAPTORS + name: p for name, p in host.adaptors.named_parameters()}


def beside(model: Model) -> dict[str, torch.Tensor]:
    """The weights of adaptors, by the names that `named` gives their parameters; of a stock model, none."""
    host = Host.of(model)
    return {} if host is None else {ADAPTORS + name: value for name, value in host.adaptors.state_dict().items()}


def freeze(model: Model) -> None:
    """Nothing trains, of adaptors neither."""
    for parameter in named(model).values():
        parameter.requires_grad_(False)


def sizes(model: Model) -> tuple[int, int]:
    """Parameters: (all, those that serve one token in the active workflow)."""
    total, active = active_parameters(model)
    parts, host = by_leaf(model), Host.of(model)
    if host is None:
        return total, active
    used = {id(p) for p in (host.head_weight(), *host.embedding().parameters(), *host.projector().parameters())}
    passed_by = ("projector", "language.embedding", "language.head")
    unused = sum(p.numel() for leaf in passed_by for p in parts.get(leaf, {}).values() if id(p) not in used)
    own = {
        leaf: sum(p.numel() for p in members.values()) for leaf, members in parts.items() if _covers("adaptor", leaf)
    }
    # The norm stands in for one of the base's that is as large.
    serving = sum(own.values()) - own.get("adaptor.idle", 0) - own.get("adaptor.norm", 0)
    return total + sum(own.values()), active + serving - unused


def parameters_of(model: Model, part: str) -> Parameters:
    """All parameters of a part, trainable or not; 'vision' is the whole tower here.

    Raises ValueError for an unknown or empty part.
    """
    parts = _leaves(model)
    _require_known(model, part, parts)
    return {name: p for leaf, members in parts.items() if _covers(part, leaf) for name, p in members.items()}


def by_leaf(model: Model) -> dict[str, Parameters]:
    """The leaves that are there, in order, each with its parameters; together they are the model."""
    return {leaf: members for leaf, members in _leaves(model).items() if members}


def summary(model: Model) -> list[PartRow]:
    """The table of parts that are there, with what trains now; works on the meta device too."""
    rows: list[PartRow] = []
    for leaf, members in _leaves(model).items():
        if not members:
            continue
        values = list(members.values())
        rows.append(
            PartRow(
                name=leaf,
                parameters=sum(p.numel() for p in values),
                trainable=sum(p.numel() for p in values if p.requires_grad),
                dtype="+".join(sorted({str(p.dtype).removeprefix("torch.") for p in values})),
            )
        )
    return rows


def head_is_tied(model: Model) -> bool:
    """True where the output head is the input embedding."""
    if isinstance(model, Alone):
        return False
    return model.lm_head.weight is getattr(model.get_input_embeddings(), "weight", None)


def _covers(name: str, leaf: str) -> bool:
    return leaf == name or leaf.startswith(name + ".")


def _leaves(model: Model) -> dict[str, Parameters]:
    unread, upcycled = _unread(model), bool(upcycled_layers(model.config))
    parts: dict[str, Parameters] = {leaf: {} for leaf in LEAVES}
    active = active_adaptor(model)
    for name, parameter in named(model).items():  # a tied head appears once, under the embedding's name
        if name.startswith(ADAPTORS):
            whose, kind = name.removeprefix(ADAPTORS).split(".")[:2]
            leaf = f"adaptor.{_OF_AN_ADAPTOR[kind]}" if whose == active else "adaptor.idle"
        else:
            leaf = "language.unused" if upcycled and ".mlp.shared_expert" in name else _leaf(name, unread)
        parts[leaf][name] = parameter
    return parts


def active_adaptor(model: Model) -> str | None:
    """The one adaptor that is active; None where there is none, or several in one batch."""
    host = Host.of(model)
    return host.active if host is not None and isinstance(host.active, str) and host.active != TEXT else None


def _leaf(name: str, unread: set[str]) -> str:
    if name.startswith("model.vision_tower."):
        return "vision.unread" if name in unread else f"vision{_of_mixture(name)}"
    if name.startswith("adapters."):
        return "adapters"
    if name.startswith("model.multi_modal_projector."):
        return "projector"
    if name.startswith("lm_head."):
        return "language.head"
    below = name.removeprefix("model.language_model.")
    if below.startswith("embed_tokens."):
        return "language.embedding"
    # In a block, the child of the block decides: norms inside the attention (Qwen3's of queries and keys) are its own.
    child = re.sub(r"^layers\.\d+\.", "", below).split(".")[0]
    # 'post_attention_layernorm' is a norm, whatever it stands behind.
    if "norm" in child:
        return "language.norm"
    if below.endswith(".mlp.gate.weight"):  # of a sparse block; a dense one has a gate_proj
        return "language.router"
    kind = next((kind for kind, pattern in _LANGUAGE_KINDS if pattern.search(child)), "other")
    return f"language.{kind}"


def _of_mixture(name: str) -> str:
    """'.experts' or '.router' of a parameter of a tower's mixture (mixture.py), else nothing."""
    found = re.search(r"\.mixture(\.experts|\.router)\.", name)
    return "" if found is None else found[1]


def _unread(model: Model) -> set[str]:
    """Names of the tower's parameters that the features do not depend on.

    A tower defines its modules in the order of their use, so all that stands behind the last block that is read is
    unread: further blocks, the closing norm, a pooling head. Masked pre-training's mask token is, too.
    """
    tower = model.model.vision_tower
    depth = tower.config.num_hidden_layers
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int):
        layer = max(index % (depth + 1) for index in layer)
    blocks_read = layer % (depth + 1)  # hidden state 0 is the first block's input
    blocks, _ = blocks_of(tower)
    unread: set[str] = set()
    started = False
    for name, _ in tower.named_parameters():
        if inside := re.match(re.escape(blocks) + r"\.(\d+)\.", name):
            started, behind = True, int(inside[1]) >= blocks_read
        else:
            behind = started
        if behind or name.endswith("mask_token"):
            unread.add(f"model.vision_tower.{name}")
    return unread


def require_trainable(model: Model, name: str, parts: dict[str, Parameters] | None = None) -> None:
    """Raises ValueError for an unknown name (with the nearest known one), a part that is empty, or one that cannot
    train in this model."""
    _require_known(model, name, _leaves(model) if parts is None else parts)
    if name in NEVER:
        raise ValueError(f"'{name}' {NEVER[name]}: it cannot train")
    host = Host.of(model)
    if host is not None and host.names and not _covers("adaptor", name):
        raise ValueError(
            f"'{name}' is the base's, which adaptors ({', '.join(host.names)}) leave as it is: train 'adaptor', or "
            "parts of it"
        )


def _require_known(model: Model, name: str, parts: dict[str, Parameters]) -> None:
    known = ["vision", "projector", "language", "adapters", "adaptor"]
    known += [leaf for leaf in LEAVES if "." in leaf and leaf not in NEVER]
    if name not in (*known, *NEVER):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ValueError(f"unknown part '{name}'{hint} Known parts: {', '.join(known)}")
    if name == "language.head" and head_is_tied(model):
        raise ValueError(
            "'language.head' is tied to the input embedding in this model, one tensor for both: "
            "name 'language.embedding' to train it"
        )
    if name == "adaptor.head" and parts["adaptor.embedding"] and not parts[name]:
        raise ValueError(
            "'adaptor.head' is tied to the adaptor's embedding, one tensor for both, or there is none: name "
            "'adaptor.embedding' to train it, or insert the adaptor with {tied: false}"
        )
    if not any(members for leaf, members in parts.items() if _covers(name, leaf)):
        hint = _MADE_BY.get(name, "")
        if _covers("adaptor", name) and active_adaptor(model) is None:
            hint = ": no adaptor is active in it (transform: [{do: insert}])"
        raise ValueError(f"part '{name}' has no parameters in this model{hint}")
