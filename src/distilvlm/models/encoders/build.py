"""From a recipe's section to an encoder teacher."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from distilvlm.recipe.encoders import EncoderSpec

from ..sources import config_from, config_of, drawn, is_local, pretrained, refuse_pickled
from ..towers import OTHER_TOWER, checkpoint_statistics, family_statistics, side_of
from ..vlm import VisionLayout
from .convolutional import ConvolutionalEncoder
from .interface import EncoderTeacher, View
from .sam import SamEncoder
from .timm_models import TimmEncoder, known_settings, load_timm
from .vit import ViTEncoder

log = logging.getLogger(__name__)

DEFAULT_LAYER = -2
"""Of a ViT, as LLaVA and the method read CLIP."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_NOT_THE_ENCODER = (*OTHER_TOWER, "prompt_encoder.", "mask_decoder.", "shared_image_embedding.")
"""What a checkpoint holds beside its vision encoder: a text tower, SAM's decoder."""


def build_encoder(spec: EncoderSpec, name: str, seed: int = 0, meta: bool = False) -> EncoderTeacher:
    """The frozen encoder that a recipe describes.

    Args:
        name: as the recipe calls it; errors and logs do, too.
        seed: of the weights of an encoder given as `config`.
        meta: without weights, on the meta device: for a plan, which needs shapes.

    Raises:
        NotHere: the directory is not there.
        ValueError: weights that do not fit, a layer or size that is not there, an encoder of no known kind.
        ImportError: timm is needed and not installed.
    """
    dtype = _DTYPES[spec.precision]
    if spec.config is None and _backend(spec) == "timm":
        assert spec.source is not None
        # A plan asks no network for what timm knows.
        known = known_settings(spec.source) if meta and not is_local(spec.source) else None
        directory = Path() if known else _timm_directory(spec.source, meta)
        model, probe, view = load_timm(directory, spec.size, dtype, meta, known)
        encoder: EncoderTeacher = TimmEncoder(name, model, view, spec.layer, probe)
    else:
        encoder = _of_transformers(spec, name, seed, dtype, meta)
    if spec.layout == "reference" and not isinstance(encoder, SamEncoder):
        raise ValueError(f"encoder '{name}': layout 'reference' is SAM's alone; leave it out")
    log.info(
        "encoder '%s': %s at %d px, %d×%d tokens of %d channels%s",
        name,
        type(encoder.model).__name__,
        encoder.size,
        *encoder.grid,
        encoder.channels,
        ", gives importance" if encoder.gives_importance else "",
    )
    return encoder


def frozen_copy(tower: PreTrainedModel, layout: VisionLayout, name: str = "anchor") -> EncoderTeacher:
    """The anchor: the tower as it is now, read as the student's is; what becomes of the tower changes it no more."""
    # The configuration of a composed model's tower is the model's, too: it is copied, because blocks are cut off.
    return ViTEncoder(name, copy.deepcopy(tower), View(layout.size, layout.mean, layout.std), layout.layer)


def _of_transformers(spec: EncoderSpec, name: str, seed: int, dtype: torch.dtype, meta: bool) -> EncoderTeacher:
    if spec.source is not None:
        config = config_of(spec.source, offline_first=meta)
    else:
        config = config_from(spec.config or {}, f"encoders.{name}.config")
    half = getattr(config, "vision_config", None)
    config = half if isinstance(half, PretrainedConfig) else config
    view = _view(spec, config, name, meta)
    if meta:
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=dtype)
    elif spec.source is None:
        with drawn(seed, f"encoder {name}"):
            model = AutoModel.from_config(config, dtype=torch.float32).to(dtype)
    else:
        model = _pretrained(spec.source, config, dtype)
    if config.model_type in ("sam_vision_model", "sam_hq_vision_model"):
        if spec.layer is not None:
            raise ValueError(f"encoder '{name}' (SAM) is read behind its neck: leave out 'layer'")
        return SamEncoder(name, model, view, spec.layout)
    if hasattr(config, "patch_size") and hasattr(config, "hidden_size"):  # a pyramid of features has several sizes
        return ViTEncoder(name, model, view, DEFAULT_LAYER if spec.layer is None else spec.layer)
    return ConvolutionalEncoder(name, model, view, spec.layer)


def _pretrained(source: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    kind: Any = MODEL_MAPPING[type(config)]  # the encoder's own class, also for a checkpoint of more

    def load(source: str, **options: Any) -> Any:
        return kind.from_pretrained(source, config=config, **options)

    return pretrained(load, source, dtype, ignored=_NOT_THE_ENCODER)


def _view(spec: EncoderSpec, config: PretrainedConfig, name: str, meta: bool) -> View:
    statistics = None if spec.source is None else checkpoint_statistics(spec.source, local_only=meta)
    if statistics is None:
        statistics = family_statistics(config.model_type)
        log.info("encoder '%s': pixel mean and deviation of its family: %s, %s", name, *statistics)
    size = spec.size or side_of(config, "image_size")
    if size is None:
        raise ValueError(f"encoder '{name}' ('{config.model_type}') states no picture size: give 'size'")
    return View(size, *statistics)


def _backend(spec: EncoderSpec) -> str:
    if spec.backend != "auto":
        return spec.backend
    assert spec.source is not None
    if not is_local(spec.source):
        return "timm" if spec.source.startswith("timm/") else "transformers"
    facts = json.loads((Path(spec.source).expanduser() / "config.json").read_text(encoding="utf-8"))
    return "timm" if "architecture" in facts else "transformers"


def _timm_directory(source: str, meta: bool) -> Path:
    if is_local(source):
        refuse_pickled(Path(source).expanduser())
        return Path(source).expanduser()
    source = source if "/" in source else f"timm/{source}"
    found = [cached_file(source, name) for name in ("config.json", *(() if meta else ("model.safetensors",)))]
    return Path(str(found[0])).parent
