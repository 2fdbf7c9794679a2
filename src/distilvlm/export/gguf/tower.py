"""What sees for a language model in llama.cpp: tower and projector, `mmproj-f16.gguf`.

llama.cpp's graph for LLaVA (projector type `mlp`) is a plain vision transformer up to the layer that is read, whose
class token is taken off where there is one, and two linear layers with GELU between them.

Builds since May 2025 put the class token behind the patches, and still take position 0 and the first output for it
(ggml-org/llama.cpp, issue 25814; pull request 25844 puts it in front again). So that positions are right in all
builds, they are not written as a table, but added to each patch as its bias, and to the class token itself. What can't
be helped is that affected builds then hand over the class token instead of the first patch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from distilvlm.models.plain_vit import Block, plain_vit, require_plain
from distilvlm.models.vlm import VLM, VisionLayout

from .writing import Writer

CLASS_TOKEN = (
    "llama.cpp since May 2025 hands over the tower's class token instead of its first patch (its issue 25814), until "
    "its pull request 25844 is in: students with SigLIP towers are right in every build"
)

_BLOCK = {
    "first": "ln1",
    "second": "ln2",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_out",
    "up": "ffn_up",
    "down": "ffn_down",
}
_ACTIVATIONS = {"quick_gelu": None, "gelu": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "silu": "silu"}
"""What llama.cpp computes for each; its GELU is the tanh form, from a table in f16."""


def require_tower(config: Any, layout: VisionLayout) -> None:
    """Raises ValueError for a tower or projector that llama.cpp's graph does not compute, with the reason."""
    vision: PretrainedConfig = config.vision_config
    require_plain(vision, layout)
    facts: Any = vision
    if facts.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"its tower uses '{facts.hidden_act}': llama.cpp has {', '.join(_ACTIVATIONS)}")
    if _ACTIVATIONS.get(config.projector_hidden_act) != "gelu":
        raise ValueError(f"its projector uses '{config.projector_hidden_act}', and llama.cpp's has gelu")
    if not config.multimodal_projector_bias:
        raise ValueError("its projector has no bias, and llama.cpp's has one")
    grid = (layout.size // layout.patch) ** 2
    if layout.placeholders != grid or not all(layout.visual):
        raise ValueError(
            f"it hands over {layout.placeholders} features of {grid} patches (vision.select '{layout.select}'), and "
            "llama.cpp hands over all patches and nothing else"
        )
    if getattr(facts, "intermediate_size", None) == facts.hidden_size:
        raise ValueError("its tower's feed-forwards are as wide as the tower: llama.cpp takes up for down then")


def write_tower(vlm: VLM, path: Path, name: str) -> bool:
    """Write `path`, in f16. Returns whether the tower has a class token."""
    config: Any = vlm.model.config
    layout = vlm.layout
    vit = plain_vit(vlm.model.model.vision_tower, layout)  # pyright: ignore
    writer = Writer(path, "clip", "f16")
    facts = writer.facts
    facts.add_type("mmproj")
    facts.add_name(name)
    facts.add_clip_has_vision_encoder(True)
    facts.add_clip_projector_type("mlp")
    facts.add_vision_image_size(layout.size)
    facts.add_vision_patch_size(layout.patch)
    facts.add_vision_embedding_length(vit.patch.shape[0])
    facts.add_vision_feed_forward_length(vit.inner)
    facts.add_vision_block_count(len(vit.blocks))
    facts.add_array("clip.vision.feature_layer", [len(vit.blocks)])  # else the last block is taken for unread
    facts.add_vision_head_count(vit.heads)
    facts.add_vision_attention_layernorm_eps(vit.epsilon)
    facts.add_vision_projection_dim(config.get_text_config().hidden_size)
    facts.add_vision_image_mean(list(layout.mean))
    facts.add_vision_image_std(list(layout.std))
    activation = _ACTIVATIONS[vit.activation]
    if activation is not None:
        getattr(facts, f"add_vision_use_{activation}")(True)
    writer.add("v.patch_embd.weight", vit.patch, "f32")
    if vit.class_token:
        writer.add("v.class_embd", vit.constant[0], "f32")
        writer.add("v.patch_embd.bias", vit.constant[1:], "f32")
        writer.add("v.position_embd.weight", torch.zeros_like(vit.constant), "f32")
    else:
        writer.add("v.position_embd.weight", vit.constant, "f32")
    if vit.before is not None:
        writer.add("v.pre_ln.weight", vit.before[0])
        writer.add("v.pre_ln.bias", vit.before[1])
    for number, block in enumerate(vit.blocks):
        _write(writer, number, block)
    projector: Any = vlm.model.model.multi_modal_projector
    for number, linear in ((0, projector.linear_1), (2, projector.linear_2)):
        writer.add(f"mm.{number}.weight", linear.weight)
        writer.add(f"mm.{number}.bias", linear.bias)
    writer.close()
    return vit.class_token


def _write(writer: Writer, number: int, block: Block) -> None:
    for part, theirs in _BLOCK.items():
        weight, bias = getattr(block, part)
        writer.add(f"v.blk.{number}.{theirs}.weight", weight)
        writer.add(f"v.blk.{number}.{theirs}.bias", bias)
