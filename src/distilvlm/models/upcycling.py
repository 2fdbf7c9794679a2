"""A trained dense model becomes a sparse one: in chosen layers, several copies of the feed-forward and a router.

The result is a stock `Qwen2Moe` language model, alone or in the Llava it came in, that computes what the dense model
does until something trains: all experts of a layer are equal, and their weights sum to 1. Everything but feed-forwards
stays as it is. Source: LLaVA-MoD (specification §1.2, §5.1, §5.2).

`Qwen2Moe` always has a shared expert. Here it is as narrow as sharded servers take it, all zeros, and never trains
(`language.unused`): zeros times anything add nothing. A Llama gets query, key and value biases of zero, which the same
servers expect.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2MoeModel,
)
from transformers.initialization import no_init_weights

from . import routing
from .alone import Alone
from .language import UPCYCLED, head_of
from .mixture import mixtures
from .sources import drawn
from .vlm import VLM

log = logging.getLogger(__name__)

Model = TypeVar("Model", VLM, PreTrainedModel)

SHARED_WIDTH = 64
"""Width of the shared expert of zeros: divisible by the usual numbers of shards."""

TOLERANCE = 1e-5
"""Largest difference of a layer's output, as a share of its largest entry, that rounding in fp32 explains."""

_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_SAME_OF_QWEN2 = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
"""What a dense configuration and Qwen2Moe's have in common."""

_ORDERS = {
    "even": lambda total: list(range(0, total, 2)),
    "odd": lambda total: list(range(1, total, 2)),
    "first_half": lambda total: list(range(total // 2)),
    "second_half": lambda total: list(range(total // 2, total)),
    "all": lambda total: list(range(total)),
}


def upcycle(
    model: Model,
    experts: int = 4,
    top_k: int = 2,
    layers: str | Sequence[int] = "even",
    seed: int = 0,
) -> Model:
    """A sparse model that equals the dense `model`; what is not a feed-forward shares its tensors.

    Args:
        model: a `VLM`, a stock Llava, or a causal language model alone: Llama (SmolLM2) or Qwen2 (Qwen2.5).
        experts, top_k: copies of a layer's feed-forward, and how many of them serve a token.
        layers: "even" (every second one, from layer 0), "odd", "first_half", "second_half", "all", or their numbers.
        seed: of the routers, which are drawn as `nn.Linear` draws its weights: U(−1/√d, 1/√d). How they choose in
            training is set by `routing.install`.

    Raises:
        ValueError: a language model that Qwen2Moe cannot hold, with the reason; layers that are not there; the result
            is another function than the dense model (on real weights).
    """
    if top_k > experts or top_k < 1:
        raise ValueError(f"top_k is {top_k}: it must be from 1 to the number of experts, {experts}")
    if isinstance(model, VLM):
        inner = upcycle(cast(PreTrainedModel, model.model), experts, top_k, layers, seed)
        return replace(model, model=cast(LlavaForConditionalGeneration, inner))
    text: Any = model.config.get_text_config()
    chosen = chosen_layers(text.num_hidden_layers, layers)
    config = sparse_config(text, experts, top_k, chosen)
    sparse = _whole(model, config)
    body = _body(sparse)
    wanted = _expanded(_body(model).state_dict(), body, chosen, experts, seed)
    body.load_state_dict(wanted, strict=True, assign=True)
    sparse.tie_weights()
    sparse.train(model.training)
    routing.install(sparse)
    _check_same(model, sparse)
    return cast(Model, sparse)


def chosen_layers(total: int, layers: str | Sequence[int]) -> list[int]:
    """Numbers of the layers that become sparse, ascending.

    Raises ValueError for an unknown word, no layers, or numbers out of range or repeated.
    """
    if isinstance(layers, str):
        if layers not in _ORDERS:
            raise ValueError(f"layers: '{layers}' is none of {', '.join(_ORDERS)}, or a list of numbers")
        found = _ORDERS[layers](total)
    else:
        found = sorted(layers)
    if not found or found[0] < 0 or found[-1] >= total or len(set(found)) < len(found):
        raise ValueError(f"layers: {found} are not different ones of the model's layers 0 to {total - 1}")
    return found


def upcycled_layers(config: PretrainedConfig) -> list[int]:
    """The layers of a language model that `upcycle` made sparse; none of any other model."""
    mark = getattr(config.get_text_config(), UPCYCLED, None)
    return list(mark["layers"]) if mark else []


def active_parameters(model: PreTrainedModel | Alone) -> tuple[int, int]:
    """Parameters of a language model, a whole Llava or a vision encoder: (all, those that serve one token), without the
    shared experts of zeros, and adapters, which are no part of it. Shared tensors count once."""
    text: Any = model.config.get_text_config()
    served = {
        id(p): 1 / one.count for one in mixtures(model) if one.routing != "dense" for p in one.experts.parameters()
    }
    share = getattr(text, "num_experts_per_tok", 1) / (getattr(text, "num_experts", None) or 1)
    unused = bool(upcycled_layers(model.config))
    total = active = 0
    for name, parameter in model.named_parameters():
        if (unused and ".shared_expert" in name) or name.startswith("adapters."):
            continue
        part = share if ".mlp.experts." in name else served.get(id(parameter), 1.0)
        total += parameter.numel()
        active += round(parameter.numel() * part)
    return total, active


def sparse_config(text: Any, experts: int, top_k: int, chosen: Sequence[int]) -> Qwen2MoeConfig:
    """The configuration of a dense language model with the layers `chosen` sparse.

    Raises ValueError for one that Qwen2Moe cannot hold, with the reason.
    """
    _require_fit(text)
    total, width = text.num_hidden_layers, text.intermediate_size
    config = Qwen2MoeConfig(
        **{name: copy.deepcopy(getattr(text, name)) for name in (*_SAME, *_SAME_OF_QWEN2) if hasattr(text, name)},
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=SHARED_WIDTH,
        # Not decoder_sparse_step=2, which would take layers 1, 3, 5, ...
        decoder_sparse_step=1,
        mlp_only_layers=[layer for layer in range(total) if layer not in chosen],
        qkv_bias=True,
        output_router_logits=False,
        # Hugging Face's own balance loss, of use only to who trains the model elsewhere: it counts all top_k choices
        # and is a mean over layers, so this is 0.01 for each sparse layer.
        router_aux_loss_coef=0.01 * len(chosen) / top_k,
    )
    config.dtype = text.dtype
    config.architectures = ["Qwen2MoeForCausalLM"]  # servers build the language model of a Llava from this entry
    setattr(config, UPCYCLED, {"from": text.model_type, "layers": list(chosen)})
    return config


def _require_fit(text: Any) -> None:
    kind = text.model_type
    if kind == "qwen2_moe":
        raise ValueError("the model is sparse already: upcycle a dense one")
    if kind not in ("llama", "qwen2"):
        raise ValueError(
            f"a '{kind}' cannot become sparse as a stock Qwen2Moe; known are llama (SmolLM2) and qwen2 (Qwen2.5). "
            "Qwen3 normalises queries and keys, which Qwen2Moe does not"
        )
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for wrong, why in (
        (text.hidden_act != "silu", f"its feed-forward's activation is {text.hidden_act}, not silu"),
        (getattr(text, "mlp_bias", False), "its feed-forward has biases"),
        (kind == "llama" and text.attention_bias, "its attention's output has a bias"),
        (head * text.num_attention_heads != text.hidden_size, f"its heads are {head} wide, not hidden size / heads"),
    ):
        if wrong:
            raise ValueError(f"this {kind} cannot become sparse as a stock Qwen2Moe: {why}")


def _whole(model: PreTrainedModel, config: Qwen2MoeConfig) -> PreTrainedModel:
    """The sparse model around a body that still lacks its weights."""
    with torch.device("meta"), no_init_weights():
        if isinstance(model, LlavaForConditionalGeneration):
            whole: Any = copy.deepcopy(model.config)
            whole.text_config = config
            sparse: Any = LlavaForConditionalGeneration(whole)
        else:
            sparse = Qwen2MoeForCausalLM(config)
    if isinstance(model, LlavaForConditionalGeneration):
        sparse.model.vision_tower = model.model.vision_tower
        sparse.model.multi_modal_projector = model.model.multi_modal_projector
        head = model.lm_head
    else:
        head = head_of(model)
    if not config.tie_word_embeddings:
        sparse.lm_head = head
    body = _body(sparse)
    # Its frequencies are computed, not loaded.
    body.rotary_emb = type(body.rotary_emb)(config).to(model.device)
    sparse.generation_config = copy.deepcopy(model.generation_config)
    return sparse


def _body(model: PreTrainedModel) -> Any:
    return model.model.language_model if isinstance(model, LlavaForConditionalGeneration) else model.base_model


def _expanded(
    dense: dict[str, Tensor], body: Qwen2MoeModel, chosen: Sequence[int], experts: int, seed: int
) -> dict[str, Tensor]:
    """The dense body's tensors under the sparse body's names; those that it lacks are made."""
    state = dict(dense)
    any_weight = next(iter(dense.values()))
    for layer in chosen:
        here = f"layers.{layer}.mlp."
        gate, up, down = (state.pop(f"{here}{name}_proj.weight") for name in ("gate", "up", "down"))
        both = torch.cat([gate, up])
        state[f"{here}experts.gate_up_proj"] = both.expand(experts, *both.shape).contiguous()  # [E, 2 inner, d]
        state[f"{here}experts.down_proj"] = down.expand(experts, *down.shape).contiguous()  # [E, d, inner]
        state[f"{here}gate.weight"] = _router(seed, layer, experts, gate.shape[1], any_weight)
    return state | zeros(body, state, any_weight)


def zeros(body: nn.Module, state: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """What a sparse body has and a dense one lacks: shared experts and, where it came from a Llama, biases; all 0."""
    return {
        name: like.new_zeros(parameter.shape)
        for name, parameter in body.named_parameters()
        if name not in state and (".shared_expert" in name or name.endswith("_proj.bias"))
    }


def _router(seed: int, layer: int, experts: int, width: int, like: Tensor) -> Tensor:
    with drawn(seed, f"router {layer}"):
        weight = torch.empty(experts, width).uniform_(-(width**-0.5), width**-0.5)
    return weight.to(like)


def _check_same(dense: PreTrainedModel, sparse: PreTrainedModel) -> None:
    """Both on a few tokens, layer by layer: in fp32 and from the same input, so that a model's rounding in bf16 hides
    nothing. On the meta device there is nothing to compare."""
    if dense.device.type == "meta":
        return
    before, after = _body(dense), _body(sparse)
    ids = torch.arange(16, device=dense.device).unsqueeze(0) % before.embed_tokens.weight.shape[0]
    difference = 0.0
    with torch.no_grad():
        hidden = before.embed_tokens(ids).float()  # [1, tokens, d]
        # Computed anew, because a model that was cast as a whole has rounded frequencies.
        turns = [type(body.rotary_emb)(body.config).to(dense.device)(hidden, ids) for body in (before, after)]
        for layers in zip(before.layers, after.layers, strict=True):
            hidden, found = (
                copy.deepcopy(layer).float().eval()(hidden, position_embeddings=turn)
                for layer, turn in zip(layers, turns, strict=True)
            )
            difference = max(difference, float((hidden - found).abs().max() / hidden.abs().max()))
    if not difference <= TOLERANCE:
        raise ValueError(f"the sparse model differs from the dense one by {difference:.1e} of the largest hidden state")
    log.info("upcycled: the sparse model equals the dense one, hidden states to %.1e of the largest", difference)
