"""Tiny encoders of every family, as sections of a recipe."""

from __future__ import annotations

import torch

from distilvlm.models.encoders import EncoderTeacher, build_encoder
from distilvlm.recipe.encoders import EncoderSpec

VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 24, "patch_size": 4}
DINO = VIT | {"layerscale_value": 0.5}
CONFIGS = {
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 32, **VIT},
    "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 32, **VIT},
    "siglip-headless": {
        "model_type": "siglip_vision_model",
        "intermediate_size": 32,
        "vision_use_head": False,
        **VIT,
    },
    "dinov2": {"model_type": "dinov2", **DINO},
    "dinov2-registers": {"model_type": "dinov2_with_registers", "num_register_tokens": 3, **DINO},
    "dinov3": {"model_type": "dinov3_vit", "intermediate_size": 32, "num_register_tokens": 2, **VIT},
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "image_size": 64},
    "sam": {
        "model_type": "sam_vision_model",
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 32,
    },
}
WITH_CLS = ["clip", "dinov2", "dinov2-registers", "dinov3"]
VITS = [*WITH_CLS, "siglip", "siglip-headless"]


def spec(family: str, **fields) -> EncoderSpec:
    return EncoderSpec.model_validate({"config": CONFIGS[family], **fields})


def encoder(family: str, **fields) -> EncoderTeacher:
    """Weights of more than initialisation's size, so that attention is far from uniform."""
    built = build_encoder(spec(family, **fields), family, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in built.model.parameters():
        values = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.1)
        parameter.data += values.to(parameter.dtype)
    return built


def canvases(count: int = 3, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
