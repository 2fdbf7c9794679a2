"""The vision tower of MoVE-KD's own checkpoints, whose experts are modules of their own below each feed-forward:

    ….vision_model.encoder.layers.N.mlp.original_module.{fc1,fc2}.{weight,bias}    the tower's own
    ….vision_model.encoder.layers.N.mlp.moe_down.E.{lora_A,lora_B}.{weight,bias}   expert E on fc1 ("down")
    ….vision_model.encoder.layers.N.mlp.moe_up.E.{lora_A,lora_B}.{weight,bias}     and on fc2
    ….vision_model.encoder.layers.N.mlp.router.{weight,bias}

Published checkpoints are whole LLaVAs, with the adapters of teachers inside, which nothing needs; a first stage leaves
`mole_encoder.bin`, experts and routers without the tower that they belong to. All of the tower is brought to one dtype:
the code's own surgery leaves it in fp32 beside a bf16 language model (specification T10).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from .alone import Alone, Encoder
from .llava_mod import SELECT, geometry_in, tensors_in
from .mixture import MixConfig, mix
from .save import Geometry
from .sources import NotHere, config_of, require_tensors
from .towers import checkpoint_statistics, family_statistics, layout_of, pretrained_tower, vision_half

log = logging.getLogger(__name__)

_TOWER = re.compile(r"(?:.*\.)?vision_model\.(.+)")
_LAYER = re.compile(r"(encoder\.layers\.(\d+)\.mlp\.)(.+)")
_EXPERT = re.compile(r"moe_(down|up)\.(\d+)\.lora_([AB])\.(weight|bias)")
_PLACES = {"down": 0, "up": 1}
_NAMES = {"A": {"weight": "down", "bias": "down_bias"}, "B": {"weight": "up", "bias": "up_bias"}}
_PICKLED = ("pytorch_model*.bin", "mole_encoder.bin")
_COMPUTED = "embeddings.position_ids"


def load(
    checkpoint: str | Path,
    vision: str | None = None,
    alpha: float = 1.0,
    routing: Literal["top1", "dense"] = "top1",
    dtype: torch.dtype = torch.float32,
) -> tuple[Encoder, Geometry]:
    """The vision tower of a directory, with its experts, and how its pictures became canvases.

    Args:
        checkpoint: with config.json and safetensors, pytorch_model*.bin or mole_encoder.bin.
        vision: directory or hub id of the CLIP that it is built on; default: what the checkpoint names. Its weights are
            read where the checkpoint has none.
        alpha, routing: as it was trained, which its tensors do not tell; defaults: as in the method's scripts.
        dtype: of the whole tower.

    Raises:
        NotHere: a directory that is not there.
        ValueError: no experts in it; a tensor that is missing, left over or of another shape.
    """
    place = Path(checkpoint)
    if not (place / "config.json").is_file():
        raise NotHere(place / "config.json")
    facts: dict[str, Any] = json.loads((place / "config.json").read_text(encoding="utf-8"))
    named = vision or facts.get("mm_vision_tower")
    if not named:
        raise ValueError(f"{place}/config.json names no vision encoder (mm_vision_tower): give one")
    config = vision_half(config_of(named, offline_first=True))
    state = stock_names(tensors_in(place, _PICKLED))
    if not any(name.endswith(".mlp.fc1.weight") for name in state):
        log.info("%s has experts alone, and not the tower they belong to: that is %s", place, named)
        state = {**pretrained_tower(named, config, dtype).state_dict(), **state}
    tower = tower_of(state, config, alpha, routing, dtype, f"checkpoint {place}")
    statistics = checkpoint_statistics(named) or family_statistics(config.model_type)
    select: Any = SELECT[facts.get("mm_vision_select_feature", "patch")]
    layout = layout_of(config, facts.get("mm_vision_select_layer", -2), select, statistics)
    return Encoder(Alone(tower, layout.layer), layout), geometry_in(facts)


def tower_of(
    state: Mapping[str, Tensor],
    config: PretrainedConfig,
    alpha: float = 1.0,
    routing: Literal["top1", "dense"] = "top1",
    dtype: torch.dtype = torch.float32,
    told: str = "the checkpoint",
) -> PreTrainedModel:
    """A tower with experts from tensors under our names.

    Args:
        state: as `stock_names` gives it.
        config: of the stock tower; stays as it is.
        told: whose tensors they are.

    Raises:
        ValueError: no experts; a tensor that is missing, left over or of another shape.
    """
    layers = sorted(
        {int(found[1]) for name in state if (found := re.match(r"encoder\.layers\.(\d+)\..*mixture", name))}
    )
    stacks = [value for name, value in state.items() if name.endswith(".mixture.experts.0.down")]
    if not stacks:
        raise ValueError(f"{told}: no tensor is an expert's (moe_down, moe_up): this is no checkpoint of MoVE-KD's")
    count, rank, _ = stacks[0].shape
    tower = AutoModel.from_config(config, dtype=dtype)
    mix(tower, MixConfig(experts=count, rank=rank, alpha=alpha, routing=routing, layers=layers), layer=-1)
    require_tensors(told, tower.state_dict(), state, "of a tower with experts")
    tower.load_state_dict({name: value.to(dtype) for name, value in state.items()})
    return tower.eval()


def stock_names(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower's tensors of a checkpoint under the names of a tower with experts; all others are left out."""
    state: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in reference.items():
        inside = _TOWER.fullmatch(name)
        if inside is None or inside[1] == _COMPUTED:
            continue
        if layer := _LAYER.fullmatch(inside[1]):
            layers.setdefault(layer[1], {})[layer[3]] = value
        else:
            state[inside[1]] = value
    for layer, tensors in layers.items():
        state |= {f"{layer}{name}": value for name, value in of_feed_forward(tensors).items()}
    return state


def of_feed_forward(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer's tensors, named from the feed-forward on, under our names; experts stacked, B transposed."""
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, value in reference.items():
        if found := _EXPERT.fullmatch(name):
            ours = _NAMES[found[3]][found[4]]
            value = value.T if ours == "up" else value
            experts.setdefault(f"mixture.experts.{_PLACES[found[1]]}.{ours}", {})[int(found[2])] = value
        elif name.startswith("router."):
            state[f"mixture.{name}"] = value
        else:
            state[name.removeprefix("original_module.")] = value
    for name, each in experts.items():
        if set(each) == set(range(len(each))):  # otherwise it is told as missing, by our name
            state[name] = torch.stack([each[number] for number in range(len(each))])
    return state
