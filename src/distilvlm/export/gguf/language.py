"""The language model of a student as a GGUF file: Llama and Qwen2, dense."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from distilvlm.data.template import llama_cpp_template
from distilvlm.models.vlm import VLM

from ..ours import ends_of
from .vocabulary import Vocabulary
from .writing import Type, Writer, held

_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Stock checkpoint → llama.cpp, for one layer or the whole."""


def require_language(config: PretrainedConfig) -> None:
    """Raises ValueError for a language model that is not written, with the reason."""
    facts: Any = config
    if config.model_type not in ("llama", "qwen2"):
        raise ValueError(f"its language model is a '{config.model_type}', and only dense Llama and Qwen2 are written")
    if facts.hidden_act != "silu":
        raise ValueError(f"its feed-forwards use '{facts.hidden_act}', and llama.cpp's '{config.model_type}' has silu")
    if getattr(facts, "use_sliding_window", False):
        raise ValueError("its attention slides (use_sliding_window), which llama.cpp's 'qwen2' does not")
    rope = facts.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(
            f"its positions are scaled as '{rope['rope_type']}': only default, linear and llama3 are written"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("it rotates a part of each head only (partial_rotary_factor)")


def write_language(vlm: VLM, path: Path, wanted: Type, vocabulary: Vocabulary, name: str) -> None:
    """Write `path`. What is refused was refused before (`require_language`)."""
    config: Any = vlm.model.config.get_text_config()
    writer = Writer(path, config.model_type, wanted)
    facts = writer.facts
    facts.add_name(name)
    facts.add_context_length(config.max_position_embeddings)
    facts.add_embedding_length(config.hidden_size)
    facts.add_block_count(config.num_hidden_layers)
    facts.add_feed_forward_length(config.intermediate_size)
    facts.add_head_count(config.num_attention_heads)
    facts.add_head_count_kv(config.num_key_value_heads)
    facts.add_layer_norm_rms_eps(config.rms_norm_eps)
    facts.add_vocab_size(vlm.embedding_rows)
    width = _head_width(config)
    facts.add_key_length(width)
    facts.add_value_length(width)
    facts.add_rope_dimension_count(width)
    _positions(writer, config, width)
    _words(writer, vlm, vocabulary)
    for key, weight in _weights(vlm).items():
        place = re.match(r"layers\.(\d+)\.", key)
        module, kind = key[place.end() if place else 0 :].rsplit(".", 1)
        if config.model_type == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in module else config.num_key_value_heads
            weight = _interleaved(weight, heads)
        begins = f"blk.{place[1]}." if place else ""
        writer.add(f"{begins}{_NAMES[module]}.{kind}", weight, vocabulary=module == "embed_tokens")
    if not config.tie_word_embeddings:
        writer.add("output.weight", vlm.model.lm_head.weight, vocabulary=True)
    writer.close()


@contextmanager
def holding(vlm: VLM, wanted: Type) -> Iterator[None]:
    """Inside, the language model has the very values that a file of type `wanted` holds: what llama.cpp says differs
    then by how it computes, not by what it was given."""
    words: list[Any] = [vlm.model.get_input_embeddings(), vlm.model.lm_head]
    inner: list[Any] = [module for module in vlm.model.get_decoder().modules() if isinstance(module, nn.Linear)]
    kept = [(module, module.weight.data) for module in [*inner, *words]]
    try:
        for module, weight in kept:
            module.weight.data = held(weight, wanted, vocabulary=module in words)
        yield
    finally:
        for module, weight in kept:
            module.weight.data = weight


def _weights(vlm: VLM) -> dict[str, Tensor]:
    return dict(vlm.model.get_decoder().named_parameters())


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order in which llama.cpp's 'llama' rotates them: pairs side by side, where
    transformers pairs a head's first half with its second."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _positions(writer: Writer, config: Any, width: int) -> None:
    rope = config.rope_parameters
    writer.facts.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        import gguf

        writer.facts.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.facts.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add("rope_freqs.weight", _llama3_factors(rope, width))


def _llama3_factors(rope: dict[str, Any], width: int) -> Tensor:
    """[width / 2]: by how much each frequency is divided: long waves by the factor, short ones not at all."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the first context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    short = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - short) / rope["factor"] + short)).float()


def _words(writer: Writer, vlm: VLM, vocabulary: Vocabulary) -> None:
    tokenizer: Any = vlm.tokenizer
    facts = writer.facts
    facts.add_tokenizer_model(vocabulary.model)
    facts.add_tokenizer_pre(vocabulary.split)
    facts.add_token_list(vocabulary.tokens)
    facts.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        facts.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        facts.add_token_scores(vocabulary.scores)
    ends = sorted({*ends_of(vlm)} - {tokenizer.eos_token_id})
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": ends[0] if ends else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for kind, number in special.items():
        if isinstance(number, int) and number < len(vocabulary.tokens):
            getattr(facts, f"add_{kind}_token_id")(number)
    facts.add_add_bos_token(vocabulary.begins)
    if isinstance(tokenizer.chat_template, str):
        facts.add_chat_template(llama_cpp_template(tokenizer.chat_template))
