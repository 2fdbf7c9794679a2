"""A CLIP, SigLIP or DINOv2 tower as one plain vision transformer: what other programs are given to compute.

Only what the features depend on: blocks behind the layer that is read, closing norms and heads are left out. What the
embeddings add to a picture's patches (positions, brought to the picture's grid by the stock class, biases, the class
token) is one constant. DINOv2's layer scales are multiplied into the weights before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .towers import blocks_of
from .vlm import VisionLayout


@dataclass(frozen=True)
class Block:
    """x + output(attention(first(x))), then x + down(act(up(second(x)))); each is (weight, bias) in fp32."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    output: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PlainViT:
    patch: Tensor  # [d, 3, patch, patch]: a picture's patches, without bias
    constant: Tensor  # [tokens, d]: what is added to them, the class token in front where there is one
    class_token: bool
    before: tuple[Tensor, Tensor] | None  # norm in front of the blocks
    blocks: tuple[Block, ...]
    activation: str
    heads: int
    inner: int
    epsilon: float


_CLIP = {
    "first": "layer_norm1",
    "second": "layer_norm2",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_DINO = {
    "first": "norm1",
    "second": "norm2",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "output": "attention.o_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_SCALES = {"output": "layer_scale1.lambda1", "down": "layer_scale2.lambda1"}
_BLOCKS: dict[str, Mapping[str, str]] = {"clip_vision_model": _CLIP, "siglip_vision_model": _CLIP, "dinov2": _DINO}


def require_plain(config: PretrainedConfig, layout: VisionLayout) -> None:
    """Raises ValueError for a tower that is no such transformer, with the reason."""
    kind = config.model_type
    if kind not in _BLOCKS:
        raise ValueError(f"its vision tower is a '{kind}', and only CLIP, SigLIP and DINOv2 towers are plain ones")
    if getattr(config, "use_swiglu_ffn", False):
        raise ValueError("its DINOv2 tower has gated feed-forwards (use_swiglu_ffn)")
    if not getattr(config, "qkv_bias", True):
        raise ValueError("its DINOv2 tower projects queries, keys and values without bias (qkv_bias)")
    if layers_read(config, layout) < 1:
        raise ValueError(f"it reads hidden state {layout.layer} of its tower, which no block has touched")


def layers_read(config: PretrainedConfig, layout: VisionLayout) -> int:
    """Blocks in front of the hidden state that is read."""
    return layout.layer % (config.num_hidden_layers + 1)


@torch.no_grad()
def plain_vit(tower: nn.Module, layout: VisionLayout) -> PlainViT:
    """What `tower` computes, in fp32. `require_plain` has accepted it."""
    config: Any = tower.config
    tower = tower.eval()
    embeddings: Any = tower.embeddings
    convolution = next(module for module in embeddings.modules() if isinstance(module, nn.Conv2d))
    blank = torch.zeros(1, 3, layout.size, layout.size, dtype=convolution.weight.dtype)
    constant: Tensor = embeddings(blank)[0]  # [tokens, d]
    grid = layout.size // layout.patch
    read = blocks_of(tower)[1][: layers_read(config, layout)]
    names = _BLOCKS[config.model_type]
    blocks = tuple(Block(**{part: _scaled(block, part, name) for part, name in names.items()}) for block in read)
    before = getattr(tower, "pre_layrnorm", None)
    return PlainViT(
        patch=convolution.weight.float(),
        constant=constant.float(),
        class_token=len(constant) == grid * grid + 1,
        before=None if before is None else _pair(before),
        blocks=blocks,
        activation=config.hidden_act,
        heads=config.num_attention_heads,
        inner=len(blocks[0].up[0]),
        epsilon=config.layer_norm_eps,
    )


def _scaled(block: nn.Module, part: str, name: str) -> tuple[Tensor, Tensor]:
    weight, bias = _pair(block.get_submodule(name))
    scale = dict(block.named_parameters()).get(_SCALES.get(part, ""))
    return (weight, bias) if scale is None else (scale.float()[:, None] * weight, scale.float() * bias)


def _pair(module: Any) -> tuple[Tensor, Tensor]:
    return module.weight.detach().float(), module.bias.detach().float()
