"""Reading checkpoints of LLaVA-MoD's own repository, dense and sparse, as stock models.

Their directories hold a configuration of a custom class and its weights, where a sparse layer is DeepSpeed's:

    model.layers.I.mlp.deepspeed_moe.gate.wg.weight                                       the router
    model.layers.I.mlp.deepspeed_moe.experts.deepspeed_experts.E.{gate,up,down}_proj.weight
    model.mm_projector.image_spatial_proj.{0,2}.{weight,bias}                             LLaVA's projector
    model.image_tower.image_tower.…                                                       CLIP, where it was saved, too

Which layers are sparse is told by these names alone: their loader goes by the directory's name, and builds a dense
model with random feed-forwards where that lacks "moe" (specification §4.2). What a stock model cannot hold is refused.

This is the one place that reads pickled weights (`pytorch_model*.bin`, the only kind that their code writes; also for
MoVE-KD's, move_kd.py), with `weights_only=True`: torch then builds tensors and runs nothing else that the file says.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)
from transformers.initialization import no_init_weights

from .image_token import place_image_token
from .save import Geometry
from .sources import NotHere, config_of, require_tensors, tokenizer_of
from .towers import checkpoint_statistics, family_statistics, layout_of, pretrained_tower, vision_half
from .upcycling import sparse_config, zeros
from .vlm import VLM

log = logging.getLogger(__name__)

_EXPERT = re.compile(
    r"layers\.(\d+)\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(gate|up|down)_proj\.weight"
)
_ROUTER = re.compile(r"layers\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.weight")
_TOWER = re.compile(r"model\.(?:image|vision)_tower\.(?:image|vision)_tower\.(?:vision_model\.)?(.+)")
_PROJECTOR = re.compile(r"model\.mm_projector\.(?:image_spatial_proj\.)?([02])\.(weight|bias)")
SELECT = {"patch": "default", "cls_patch": "full"}
"""What LLaVA calls what a stock one calls its strategy of selecting features."""

_COMPUTED = (".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Ends of names of what a model computes for itself, which older checkpoints hold."""

_CANNOT = (
    (r"\.mlp\.(mlp|coefficient)\.", "its sparse layers are residual ones (use_residual)"),
    (r"lora_", "it holds adapters that were not merged (LoRA)"),
    (r"\.mm_projector\.", "its projector is not 'mlp2x_gelu', LLaVA's two layers"),
)
"""Names of tensors that no stock Llava has a place for -> why."""


def load(checkpoint: str | Path, vision: str | None = None) -> tuple[VLM, Geometry]:
    """The model of a directory, and how its pictures became canvases. Weights keep their dtypes.

    Args:
        checkpoint: with config.json, tokenizer, and safetensors or pytorch_model*.bin.
        vision: directory or hub id of the encoder; default: what the checkpoint names. Its weights are read where the
            checkpoint does not hold the tower.

    Raises:
        NotHere: a directory that is not there.
        ValueError: another kind of checkpoint; a tensor that is missing, left over or of another shape; what a stock
            model cannot hold, with the reason.
    """
    place = Path(checkpoint)
    if not (place / "config.json").is_file():
        raise NotHere(place / "config.json")
    facts: dict[str, Any] = json.loads((place / "config.json").read_text(encoding="utf-8"))
    tensors = tensors_in(place)
    body, tower, projector, head = parted(tensors, place)
    text = dense_config(facts, body, place)
    sparse = _sparse_layers(body)
    if sparse:
        top_k = _top_k(facts, place)
        expert_counts = {len(experts) for experts in sparse.values()}
        if len(expert_counts) > 1:
            raise ValueError(f"{place}: sparse layers have {sorted(expert_counts)} experts; a stock model has as many")
        experts = expert_counts.pop()
        config: PretrainedConfig = sparse_config(text, experts, top_k, sorted(sparse))
        config.norm_topk_prob = top_k > 1  # DeepSpeed's top-1 gate takes the probability as it is
        log.info("%s: layers %s are sparse, %d of %d experts", place, sorted(sparse), top_k, experts)
    else:
        config = text
        log.info("%s: dense", place)

    return composed(
        place,
        facts,
        config,
        language=lambda made: _stock(body, sparse, made, text),
        head=output_head(head, body, text, place),
        projector=projector,
        tower=tower,
        vision=vision,
    )


def composed(
    place: Path,
    facts: Mapping[str, Any],
    text: PretrainedConfig,
    language: Callable[[torch.nn.Module], Mapping[str, Tensor]],
    head: Tensor,
    projector: Mapping[tuple[str, str], Tensor],
    tower: Mapping[str, Tensor],
    vision: str | None,
) -> tuple[VLM, Geometry]:
    """A stock Llava of a checkpoint's parts, and how its pictures became canvases.

    Args:
        facts: of config.json, in the words of LLaVA's early code.
        text: the language model's stock configuration.
        language: its stock body, empty -> the body's weights by stock names.
        projector: ('0' or '2', 'weight' or 'bias') -> LLaVA's two layers.
        tower: weights of the encoder, or nothing where the checkpoint does not hold it.
        vision: directory or hub id of the encoder; None: what `facts` name.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; no encoder is named.
    """
    named = vision or facts.get("mm_image_tower") or facts.get("mm_vision_tower")
    if not named:
        raise ValueError(f"{place}/config.json names no vision encoder (mm_image_tower): give one")
    seen = vision_half(config_of(named, offline_first=True))
    statistics = checkpoint_statistics(named) or family_statistics(seen.model_type)
    select = SELECT[facts.get("mm_vision_select_feature", "patch")]
    layout = layout_of(seen, facts.get("mm_vision_select_layer", -2), select, statistics)  # pyright: ignore

    tokenizer = tokenizer_of(str(place), plan=False)
    assert tokenizer is not None  # only a plan may lack it
    image_id = place_image_token(tokenizer, text.vocab_size)
    whole = LlavaConfig(
        vision_config=seen,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=layout.placeholders,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=layout.select,
        vision_feature_layer=layout.layer,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with no_init_weights():
        model = LlavaForConditionalGeneration(whole)
    state = {f"model.language_model.{name}": value for name, value in language(model.model.language_model).items()}
    state |= {f"model.multi_modal_projector.linear_{1 + int(n) // 2}.{kind}": v for (n, kind), v in projector.items()}
    if not tower:
        tower = pretrained_tower(named, seen, torch.float32).state_dict()
    state |= {f"model.vision_tower.{name}": value for name, value in tower.items()}
    state["lm_head.weight"] = head
    _fill(model, state, place)
    if (place / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    return VLM(model.eval(), tokenizer, layout, image_id), geometry_in(facts)


def geometry_in(facts: Mapping[str, Any]) -> Geometry:
    """How the pictures of a LLaVA became canvases, by its configuration."""
    return "pad" if facts.get("image_aspect_ratio") == "pad" else "crop"


def tensors_in(place: Path, pickled: Sequence[str] = ("pytorch_model*.bin",)) -> dict[str, Tensor]:
    """Every tensor of a directory: safetensors if there are some, else pickled files of these names.

    Raises ValueError where there are neither, or a pickled file holds more than tensors.
    """
    found: dict[str, Tensor] = {}
    if files := sorted(place.glob("*.safetensors")):
        for file in files:
            found |= load_file(file)
        return found
    for file in sorted(file for name in pickled for file in place.glob(name)):
        log.info("reading %s, a pickled file, as tensors only", file)
        try:
            found |= torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{file} holds more than tensors (or something else), so it is not read") from error
    if not found:
        raise ValueError(f"{place} holds neither *.safetensors nor {' or '.join(pickled)}")
    return found


def parted(
    tensors: Mapping[str, Tensor], place: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[tuple[str, str], Tensor], Tensor | None]:
    """(language model's body, tower, projector, head), each without what stood before its names."""
    body: dict[str, Tensor] = {}
    tower: dict[str, Tensor] = {}
    projector: dict[tuple[str, str], Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(_COMPUTED) or name == "lm_head.weight":
            continue
        if inside := _TOWER.fullmatch(name):
            tower[inside[1]] = value
        elif inside := _PROJECTOR.fullmatch(name):
            projector[inside[1], inside[2]] = value
        elif reasons := [why for pattern, why in _CANNOT if re.search(pattern, name)]:
            raise ValueError(f"{place}: {reasons[0]}, which a stock Llava cannot hold (tensor '{name}')")
        else:
            body[name.removeprefix("model.")] = value
    return body, tower, projector, tensors.get("lm_head.weight")


def dense_config(facts: Mapping[str, Any], body: Mapping[str, Tensor], place: Path) -> PretrainedConfig:
    """The language model's stock configuration, as if it were dense; its type is a part of theirs (moe_llava_qwen2)."""
    given = str(facts.get("model_type"))
    kinds = {"qwen2": "qwen2", "qwen1_5": "qwen2", "llama": "llama", "llava": "llama"}
    kind = kinds.get(given.removeprefix("moe_").removeprefix("llava_"))
    if kind is None:
        raise ValueError(
            f"{place}/config.json: model_type '{given}' is none of llava_qwen2, llava_qwen1_5 and llava_llama, with or "
            "without 'moe_' before it: others have no sparse twin among stock models"
        )
    known = {name for name in vars(AutoConfig.for_model(kind)) if not name.startswith("_")}
    known = (known | {"rope_theta", "rope_scaling"}) - {"architectures", "dtype", "use_cache"}
    config = AutoConfig.for_model(kind, **{name: value for name, value in facts.items() if name in known})
    if "embed_tokens.weight" in body:  # their loader changes the vocabulary and may leave the entry as it was
        config.vocab_size = body["embed_tokens.weight"].shape[0]
    return config


def _sparse_layers(body: Mapping[str, Tensor]) -> dict[int, set[int]]:
    """Layer -> its experts, by the names of tensors."""
    found: dict[int, set[int]] = {}
    for name in body:
        if inside := _EXPERT.fullmatch(name):
            found.setdefault(int(inside[1]), set()).add(int(inside[2]))
    return found


def _top_k(facts: Mapping[str, Any], place: Path) -> int:
    top_k = (facts.get("moe") or {}).get("top_k_experts")
    if top_k not in (1, 2):
        raise ValueError(f"{place}/config.json: moe.top_k_experts is {top_k}; DeepSpeed's gates know 1 and 2")
    return top_k


def _stock(
    body: Mapping[str, Tensor], sparse: Mapping[int, set[int]], language: torch.nn.Module, text: PretrainedConfig
) -> dict[str, Tensor]:
    """The body's tensors under stock names; experts of a layer become two tensors."""
    state: dict[str, Tensor] = {}
    for name, value in body.items():
        if inside := _ROUTER.fullmatch(name):
            state[f"layers.{inside[1]}.mlp.gate.weight"] = value
        elif not _EXPERT.fullmatch(name):
            state[name] = value
    for layer, experts in sparse.items():
        here = f"layers.{layer}.mlp."
        every: list[dict[str, Tensor | None]] = [
            {
                part: body.get(f"{here}deepspeed_moe.experts.deepspeed_experts.{expert}.{part}_proj.weight")
                for part in ("gate", "up", "down")
            }
            for expert in range(len(experts))
        ]
        if any(value is None for parts in every for value in parts.values()):
            continue  # told as missing, by its stock name
        state[f"{here}experts.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in every])  # pyright: ignore
        state[f"{here}experts.down_proj"] = torch.stack([e["down"] for e in every])  # pyright: ignore
    if sparse:
        made = zeros(language, state, next(iter(body.values())))
        # A Qwen2 has its biases: where one is missing, the checkpoint is not whole.
        state |= {n: zero for n, zero in made.items() if ".shared_expert" in n or text.model_type == "llama"}
    return state


def output_head(head: Tensor | None, body: Mapping[str, Tensor], text: PretrainedConfig, place: Path) -> Tensor:
    embedding = body.get("embed_tokens.weight")
    if not text.tie_word_embeddings:
        if head is None:
            raise ValueError(f"{place} lacks lm_head.weight, and its config.json does not tie it to the embedding")
        return head
    if embedding is None:
        raise ValueError(f"{place} lacks model.embed_tokens.weight")
    if head is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"{place}: lm_head.weight differs from the embedding that config.json ties it to (tie_word_embeddings)"
        )
    return embedding


def _fill(model: LlavaForConditionalGeneration, state: Mapping[str, Tensor], place: Path) -> None:
    require_tensors(f"checkpoint {place}", model.state_dict(), state, "stock names")
    model.load_state_dict(dict(state), strict=True, assign=True)
    model.tie_weights()
    model.requires_grad_(True)
