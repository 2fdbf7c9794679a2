"""Architectures of the published checkpoints that recipes name, so that a plan needs neither weights nor a network.

Facts of the checkpoints' own `config.json`; LLaVA-KD's pairs after the specification §1.3. Only what differs from the
defaults of the transformers class, or matters to a plan, is stated.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


def _qwen2(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    key_heads: int,
    tied: bool,
    theta: float,
    rows: int = 151936,
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "eos_token_id": 151643,
    }


def _smollm2(width: int, inner: int, layers: int, heads: int, key_heads: int, theta: float) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


def _dinov2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": 518,
        "patch_size": 14,
    }


def _with_registers(facts: dict[str, Any]) -> dict[str, Any]:
    return facts | {"model_type": "dinov2_with_registers", "num_register_tokens": 4}


_FACTS: dict[str, dict[str, Any]] = {
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "facebook/dinov2-small": _dinov2(384, 12, 6),
    "facebook/dinov2-base": _dinov2(768, 12, 12),
    "facebook/dinov2-large": _dinov2(1024, 24, 16),
    "facebook/dinov2-with-registers-small": _with_registers(_dinov2(384, 12, 6)),
    "facebook/dinov2-with-registers-base": _with_registers(_dinov2(768, 12, 12)),
    "facebook/dinov2-with-registers-large": _with_registers(_dinov2(1024, 24, 16)),
    "Qwen/Qwen1.5-0.5B": _qwen2(1024, 2816, 24, 16, 16, tied=True, theta=1e6),
    "Qwen/Qwen1.5-1.8B": _qwen2(2048, 5504, 24, 16, 16, tied=False, theta=1e6),
    "Qwen/Qwen1.5-4B": _qwen2(2560, 6912, 40, 20, 20, tied=False, theta=5e6),
    "Qwen/Qwen1.5-7B": _qwen2(4096, 11008, 32, 32, 32, tied=False, theta=1e6),
    "Qwen/Qwen2-0.5B": _qwen2(896, 4864, 24, 14, 2, tied=True, theta=1e6),
    "Qwen/Qwen2-1.5B": _qwen2(1536, 8960, 28, 12, 2, tied=True, theta=1e6),
    "Qwen/Qwen2-7B": _qwen2(3584, 18944, 28, 28, 4, tied=False, theta=1e6, rows=152064),
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, tied=True, theta=1e6),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, tied=True, theta=1e6),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 11008, 36, 16, 2, tied=True, theta=1e6),
    "HuggingFaceTB/SmolLM2-135M": _smollm2(576, 1536, 30, 9, 3, theta=1e5),
    "HuggingFaceTB/SmolLM2-360M": _smollm2(960, 2560, 32, 15, 5, theta=1e5),
    "HuggingFaceTB/SmolLM2-1.7B": _smollm2(2048, 8192, 24, 32, 32, theta=130000.0),
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "facebook/sam-vit-large": {
        "model_type": "sam",
        "vision_config": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "global_attn_indexes": [5, 11, 17, 23],
        },
    },
}
_FACTS["lmsys/vicuna-13b-v1.5"] = _FACTS["lmsys/vicuna-7b-v1.5"] | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
# The chat and instruct versions have the base model's architecture.
_FACTS |= {f"{name}-Chat": facts for name, facts in _FACTS.items() if name.startswith("Qwen/Qwen1.5")}
_FACTS |= {f"{name}-Instruct": facts for name, facts in _FACTS.items() if "Qwen2" in name or "SmolLM2-" in name}

KNOWN = tuple(_FACTS)
"""Hub ids whose architecture is stated here."""


def published(source: str) -> PretrainedConfig | None:
    """The configuration of a published checkpoint, or None for one that is not stated here."""
    facts = _FACTS.get(source)
    return None if facts is None else AutoConfig.for_model(**facts)
