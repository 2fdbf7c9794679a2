"""Which of a vision tower's tokens are picture: found by trying the stock class, not by a table of names.

A tower that stock Llava can hold hands over `hidden_states[layer]` as [pictures, tokens, d], all blocks with the same
tokens. Those that change with the pixels are patches; the others are CLS or registers. Llava can drop index 0
(`vision_feature_select_strategy="default"`) and nothing else.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from .sources import pretrained
from .vlm import VisionLayout

log = logging.getLogger(__name__)

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

CLIP: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

OTHER_TOWER = ("text_model.", "text_projection", "visual_projection", "logit_scale", "logit_bias")
"""What a two-tower checkpoint (CLIP, SigLIP) holds beside its vision half."""

_REFUSED = {
    "convnext": "a convolutional pyramid has no patch tokens",
    "convnextv2": "a convolutional pyramid has no patch tokens",
    "dinov3_convnext": "a convolutional pyramid has no patch tokens",
    "siglip2_vision_model": "its NaFlex form needs a patch mask that Llava doesn't pass; "
    "SigLIP 2's fixed-size checkpoints (model type 'siglip') work",
    "vit_mae": "it hides random patches",
}


def vision_half(config: PretrainedConfig) -> PretrainedConfig:
    """The vision tower's own configuration, taken out of a two-tower one (CLIP, SigLIP) where needed.

    Raises ValueError for model types that stock Llava cannot hold, with the reason.
    """
    half = getattr(config, "vision_config", None)
    if isinstance(half, PretrainedConfig):
        config = half
    if reason := _REFUSED.get(config.model_type):
        raise ValueError(f"'{config.model_type}' cannot be the vision tower of a stock Llava: {reason}")
    for field in ("patch_size", "hidden_size", "num_hidden_layers"):
        if not hasattr(config, field):
            raise ValueError(
                f"'{config.model_type}' cannot be the vision tower of a stock Llava: its configuration has no "
                f"'{field}', so it is no plain vision transformer"
            )
    return config


def layout_of(
    config: PretrainedConfig,
    layer: int,
    select: Literal["patches", "default", "full"],
    statistics: Statistics,
    size: int | None = None,
) -> VisionLayout:
    """How a tower with this configuration sees pictures of `size` pixels (default: the configuration's own).

    Needs no weights: CLS and registers are told from patches with a random tower of one block, the tokens at `layer`
    are counted on the meta device. Raises ValueError where Llava cannot read such a tower, or the size does not fit.
    """
    own_size = side_of(config, "image_size")
    size = size or own_size
    if size is None:
        raise ValueError(f"'{config.model_type}' states no picture size: give vision.size")
    patch = side_of(config, "patch_size")
    assert patch is not None
    grid = size // patch
    depth = config.num_hidden_layers
    if not -depth - 1 <= layer <= depth:
        raise ValueError(
            f"vision.layer is {layer}, but the tower has hidden states 0 to {depth} (or -{depth + 1} to -1)"
        )
    try:
        changes = tokens_that_change(config, size)
        read = hidden_state_on_meta(config, size, layer)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        if size != own_size:
            raise ValueError(
                f"'{config.model_type}' takes pictures of {own_size} px only, not {size} px: the stock class does not "
                f"interpolate its position embeddings unless asked, and Llava doesn't ask. Leave vision.size out"
            ) from error
        raise ValueError(f"'{config.model_type}' cannot be run the way Llava runs its tower: {error}") from error
    if tuple(read.shape) != (1, len(changes), config.hidden_size) or sum(changes) != grid * grid:
        raise ValueError(
            f"'{config.model_type}' cannot be the vision tower of a stock Llava: hidden state {layer} is "
            f"{list(read.shape)}, with {sum(changes)} tokens that depend on the picture, where a plain vision "
            f"transformer has [1, tokens, {config.hidden_size}] and {grid}×{grid} patches"
        )
    if select == "patches":
        select = "full" if changes[0] else "default"
    visual = tuple(changes[1:] if select == "default" else changes)
    if select == "default" and changes[0]:
        log.info("select 'default' drops the top left patch of %s, which has no CLS token", config.model_type)
    if not all(visual):
        log.info(
            "%d of %d tokens per picture are CLS or registers that Llava cannot drop: placeholders, but no visual rows",
            visual.count(False),
            len(visual),
        )
    mean, std = statistics
    return VisionLayout(
        size=size,
        patch=patch,
        placeholders=len(visual),
        visual=visual,
        mean=mean,
        std=std,
        select=select,
        layer=layer,
    )


def pretrained_tower(source: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The vision half of a checkpoint; `config` is that half's. Errors as `sources.pretrained`."""
    kind: Any = MODEL_MAPPING[type(config)]  # the vision half's own class, also for a checkpoint of two towers

    def load(source: str, **options: Any) -> Any:
        return kind.from_pretrained(source, config=config, **options)

    return pretrained(load, source, dtype, ignored=OTHER_TOWER)


def family_statistics(model_type: str) -> Statistics:
    """Pixel mean and deviation that a family's checkpoints were trained with."""
    if "siglip" in model_type or model_type in ("vit", "vit_hybrid"):
        return HALF
    if "clip" in model_type or model_type in ("aimv2_vision_model", "mlcd_vision_model"):
        return CLIP
    return IMAGENET


def checkpoint_statistics(source: str, local_only: bool = False) -> Statistics | None:
    """Pixel mean and deviation from a checkpoint's own image processor, or None where it has none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            found = cached_file(
                source,
                name,
                local_files_only=local_only,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except OSError:
            return None
        if found is None:
            continue
        content: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8"))
        content = content.get("image_processor", content)
        if "image_mean" in content and "image_std" in content:
            red, green, blue = content["image_mean"]
            deviation = content["image_std"]
            return (red, green, blue), (deviation[0], deviation[1], deviation[2])
    return None


def side_of(config: PretrainedConfig, field: str) -> int | None:
    """The side of a square that a configuration states as a number or a pair, e.g. its `image_size`; None without."""
    value = getattr(config, field, None)
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ValueError(f"'{config.model_type}' has {field} {list(value)}: only squares are supported")
        value = value[0]
    return None if value is None else int(value)


def blocks_of(tower: nn.Module) -> tuple[str, nn.ModuleList]:
    """The tower's blocks, and their name in it.

    Raises ValueError where there is no list of as many modules as the configuration has layers.
    """
    config: Any = tower.config
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return name, module
    raise ValueError(
        f"{type(tower).__name__} has no list of {config.num_hidden_layers} blocks: its parts cannot be told apart"
    )


def tokens_that_change(config: PretrainedConfig, size: int, **options: Any) -> list[bool]:
    """For every token that enters the first block: does it depend on the pixels?

    Args:
        options: for the tower's forward, e.g. `interpolate_pos_encoding`.
    """
    probe = copy.deepcopy(config)
    probe.num_hidden_layers = 1
    if getattr(probe, "layer_types", None):
        probe.layer_types = probe.layer_types[:1]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        tower = AutoModel.from_config(probe, dtype=torch.float32).eval()
        pictures = torch.stack([torch.zeros(3, size, size), torch.randn(3, size, size)])
        states: Tensor = tower(pictures, output_hidden_states=True, return_dict=True, **options).hidden_states[0]
    return (states[0] != states[1]).flatten(1).any(dim=1).tolist()


def hidden_state_on_meta(config: PretrainedConfig, size: int, layer: int, **options: Any) -> Tensor:
    """A hidden state without values, for its shape; `options` as `tokens_that_change`."""
    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(config).eval()
        pictures = torch.zeros(1, 3, size, size, dtype=tower.dtype)
        return tower(pictures, output_hidden_states=True, return_dict=True, **options).hidden_states[layer]
