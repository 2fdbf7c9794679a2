"""Converting the packaged convolutional encoders: published keys to those of a stock class, and what it has to be told.

Stock classes that are no exact copy of what was published are made one by their configuration and by constants:
EfficientNet-Lite is EfficientNet without squeeze-and-excitation, whose gates are therefore held at exactly 1.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetModel, MobileNetV2Config, MobileNetV2Model, PreTrainedModel

from .towers import IMAGENET, Statistics

LITE: Mapping[str, tuple[list[int], list[int], int]] = {
    "lite0": ([16, 24, 40, 80, 112, 192, 320], [1, 2, 2, 3, 3, 4, 1], 224),
    "lite1": ([16, 24, 40, 80, 112, 192, 320], [1, 3, 3, 4, 4, 5, 1], 224),
    "lite2": ([16, 24, 48, 88, 120, 208, 352], [1, 3, 3, 4, 4, 5, 1], 256),
}
"""Channels and blocks of each stage, and our picture size. Lite keeps stem, head, first and last stage unscaled.

Lite1 and Lite2 were trained at 240 and 260 px. The stock class pads as they do where every stage halves its side
evenly, so the sizes here are multiples of 32."""

LITE_STATISTICS: Statistics = ((127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255))
"""TensorFlow's EfficientNet-Lite was trained on (value - 127) / 128."""

OPEN_GATE = 100.0
"""A bias whose sigmoid is exactly 1 in float32 (and in bfloat16)."""


class PackagedError(RuntimeError):
    """Weights cannot be had from their package; the message says why and what to do."""


def loaded_whole(kind: Any, directory: Path, **options: Any) -> PreTrainedModel:
    """What `from_pretrained` loads in float32, if every weight found its place and every place its weight."""
    model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **options)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = [f"{kind.replace('_', ' ')}: {info[kind]}" for kind in kinds if info.get(kind)]
    if wrong:
        raise PackagedError("the package's weights do not fit the model; " + "; ".join(wrong))
    return model


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file of a package whose hash is known; nothing but tensors is unpickled."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)


def efficientnet_lite(variant: str, weights: Path, out: Path) -> None:
    channels, repeats, size = LITE[variant]
    config = EfficientNetConfig(
        image_size=size,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        in_channels=[32, *channels[:-1]],
        out_channels=channels,
        num_block_repeats=repeats,
        hidden_act="relu6",
        hidden_dim=1280,
    )
    save_stock(EfficientNetModel, config, lite_weights(load_pickled(weights), config), out)
    write_processor(out, "EfficientNetImageProcessor", size, LITE_STATISTICS)


def lite_weights(published: Mapping[str, Tensor], config: EfficientNetConfig) -> dict[str, Tensor]:
    """EfficientNet-Lite's weights under the stock names, with gates that do nothing; its classifier is left out."""
    within = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    around = {
        "_conv_stem": "embeddings.convolution",
        "_bn0": "embeddings.batchnorm",
        "_conv_head": "encoder.top_conv",
        "_bn1": "encoder.top_bn",
    }
    weights: dict[str, Tensor] = {}
    for name, value in published.items():
        if inside := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            weights[f"encoder.blocks.{inside[1]}.{within[inside[2]]}.{inside[3]}"] = value
        elif not name.startswith("_fc."):
            module, _, kind = name.rpartition(".")
            weights[f"{around[module]}.{kind}"] = value
    with torch.device("meta"):
        stock = EfficientNetModel(config)
    for name, parameter in stock.named_parameters():
        if ".squeeze_excite." in name:
            is_open = name.endswith(".expand.bias")
            weights[name] = torch.full(parameter.shape, OPEN_GATE if is_open else 0.0)
    return weights


def mobilenetv2(weights: Path, out: Path) -> None:
    config = MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5)  # as torchvision's, whose layout it is
    save_stock(MobileNetV2Model, config, mobilenet_weights(load_pickled(weights)), out)
    write_processor(out, "MobileNetV2ImageProcessor", 224, IMAGENET)


def mobilenet_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MobileNetV2's features, named by their places in a `Sequential`, under the stock names."""
    stem = {"0": "conv_3x3.convolution", "1": "conv_3x3.normalization"}
    stem |= {"3": "reduce_1x1.convolution", "4": "reduce_1x1.normalization"}
    block = {"0": "expand_1x1.convolution", "1": "expand_1x1.normalization"}
    block |= {"3": "conv_3x3.convolution", "4": "conv_3x3.normalization"}
    block |= {"6": "reduce_1x1.convolution", "7": "reduce_1x1.normalization"}
    ends = {"0": "conv_stem.first_conv", "18": "conv_1x1"}
    kinds = {"0": "convolution", "1": "normalization"}
    weights: dict[str, Tensor] = {}
    for name, value in published.items():
        found = re.fullmatch(r"features\.(\d+)\.(?:conv\.)?(\d+)\.(\w+)", name)
        if found is None:
            continue  # a classifier
        place, inner, kind = found.groups()
        if place in ends:
            weights[f"{ends[place]}.{kinds[inner]}.{kind}"] = value
        elif place == "1":
            weights[f"conv_stem.{stem[inner]}.{kind}"] = value
        else:
            weights[f"layer.{int(place) - 2}.{block[inner]}.{kind}"] = value
    return weights


def tinyvit_5m(weights: Path, out: Path) -> None:
    """TinyViT as timm has it, in timm's own form of a directory.

    MobileSAM trained its last stage on a grid twice as fine, a stride that timm's model has not. As teachers the two
    are alike: 10-class k-NN 0.54 and 0.55 on 372 photographs of clothing.
    """
    from .encoders.timm_models import load_timm

    own = tinyvit_weights(load_pickled(weights))
    save_file(own, out / "model.safetensors", metadata={"format": "pt"})
    mean, std = IMAGENET
    config = {
        "architecture": "tiny_vit_5m_224",
        "num_classes": 0,
        "num_features": 320,
        "pretrained_cfg": {"input_size": [3, 224, 224], "interpolation": "bicubic", "mean": mean, "std": std},
    }
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    try:
        load_timm(out, None, torch.float32, meta=False)
    except ValueError as error:
        raise PackagedError(f"the package's weights do not fit the model; {error}") from error


def tinyvit_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of MobileSAM under timm's names, without its neck and without tables that are computed."""
    weights: dict[str, Tensor] = {}
    for name, value in published.items():
        inside = name.removeprefix("image_encoder.")
        if inside == name or inside.startswith(("neck.", "head.", "norm_head.")) or "attention_bias_idxs" in inside:
            continue
        inside = inside.replace("patch_embed.seq.0", "patch_embed.conv1").replace(
            "patch_embed.seq.2", "patch_embed.conv2"
        )
        inside = inside.replace(".c.", ".conv.")
        # The original puts the step down to a stage's size at the end of the stage before.
        inside = re.sub(r"^layers\.(\d)\.downsample", lambda found: f"stages.{int(found[1]) + 1}.downsample", inside)
        weights[re.sub(r"^layers\.", "stages.", inside)] = value.contiguous()
    return weights


def save_stock(kind: type[PreTrainedModel], config: Any, weights: Mapping[str, Tensor], out: Path) -> None:
    """Write a stock model's directory.

    Raises:
        PackagedError: a weight is missing, of another shape or one too many.
    """
    with tempfile.TemporaryDirectory() as work:
        contiguous = {name: value.contiguous() for name, value in weights.items()}
        save_file(contiguous, Path(work) / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(work)
        loaded_whole(kind, Path(work), ignore_mismatched_sizes=True).save_pretrained(out)


def write_processor(out: Path, kind: str, size: int, statistics: Statistics, shortest_edge: int | None = None) -> None:
    """`preprocessor_config.json`: both sides resized, or the shorter one and the centre kept."""
    mean, std = statistics
    square = {"height": size, "width": size}
    crop = {"do_center_crop": True, "crop_size": square} if shortest_edge else {"do_center_crop": False}
    processor = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": shortest_edge} if shortest_edge else square,
        "resample": 3,
        **crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n", encoding="utf-8")
