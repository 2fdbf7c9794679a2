"""Building a VLM: any plain vision transformer, LLaVA's projector and any causal language model, as a stock Llava."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from distilvlm.recipe.models import LanguageSpec, ModelSpec, VisionSpec

from .alone import Alone, Encoder
from .image_token import place_image_token
from .language import cut, cut_config, head_of, kept_layers, require_plain_head
from .save import load
from .sources import config_from, config_of, drawn, pretrained, tokenizer_of
from .towers import checkpoint_statistics, family_statistics, layout_of, pretrained_tower, vision_half
from .vlm import VLM, VisionLayout

log = logging.getLogger(__name__)


def build(spec: ModelSpec, seed: int, dtype: torch.dtype = torch.float32, meta: bool = False) -> VLM:
    """The model that a recipe describes, composed of parts or from an existing checkpoint.

    Random parts are drawn by generators of their own, made from `seed`: the same spec and seed give the same bits, and
    the global generator stays as it was.

    Args:
        dtype: what all weights are held in. A checkpoint's own dtype is not kept: bf16 weights hardly move in training.
        meta: build without weights on the meta device, for a plan; then the tokenizer may be None.

    Raises:
        NotHere: a directory that the model comes from is not there.
        ValueError: parts that a stock Llava cannot hold, with the reason.
    """
    if spec.source is not None:
        return load(spec.source, dtype, meta).use(spec.workflow)
    assert spec.vision is not None and spec.language is not None  # the schema's rule
    vision, language = spec.vision, spec.language

    vision_config, layout = _see(vision, meta)
    tokenizer = tokenizer_of(language.tokenizer or language.source or "", plan=meta)
    text_config = _text_config(language, tokenizer, meta)
    rows: int = text_config.vocab_size
    image_id = rows if tokenizer is None else place_image_token(tokenizer, rows)
    kept = kept_layers(text_config.num_hidden_layers, language.layers)
    config = _llava_config(vision_config, cut_config(text_config, kept), layout, image_id, spec, dtype)
    drawn_parts = {"projector": True, "vision": vision.source is None, "language": language.source is None}
    random = frozenset(part for part, is_drawn in drawn_parts.items() if is_drawn)

    if meta:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(config)
        return VLM(model, tokenizer, layout, image_id, random)

    with drawn(seed, "vision"):
        tower = _tower(vision, vision_config, dtype)
    with drawn(seed, "language"):
        lm = _language_model(language, text_config, dtype)
    cut(lm, kept)
    with drawn(seed, "projector"):
        model = _assemble(config, tower, lm, spec.projector.init_std, dtype)
    model.generation_config = _generation_config(lm, tokenizer)
    log.info(
        "composed: %s at %d px, hidden state %d, %d placeholders (%d visual) per picture; %s with %d layers",
        vision_config.model_type,
        layout.size,
        layout.layer,
        layout.placeholders,
        sum(layout.visual),
        text_config.model_type,
        len(kept),
    )
    return VLM(model.eval(), tokenizer, layout, image_id, random)


def build_student(spec: ModelSpec, seed: int, meta: bool = False) -> VLM | Encoder:
    """The student that a recipe describes, also a vision encoder alone; as `build`."""
    if not spec.encoder_alone:
        return build(spec, seed, meta=meta)
    assert spec.vision is not None
    config, layout = _see(spec.vision, meta)
    random = frozenset({"vision"} if spec.vision.source is None else ())
    if meta:
        with torch.device("meta"):
            tower: PreTrainedModel = AutoModel.from_config(config)
    else:
        with drawn(seed, "vision"):
            tower = _tower(spec.vision, config, torch.float32)
    tower.requires_grad_(True)
    log.info(
        "an encoder alone: %s at %d px, hidden state %d, %d visual tokens per picture",
        *(config.model_type, layout.size, layout.layer, sum(layout.visual)),
    )
    return Encoder(Alone(tower.eval(), layout.layer), layout, random)


def _see(vision: VisionSpec, meta: bool) -> tuple[PretrainedConfig, VisionLayout]:
    """The tower's configuration and how it sees pictures."""
    if vision.source is not None:
        config = vision_half(config_of(vision.source, offline_first=meta))
        statistics = checkpoint_statistics(vision.source, local_only=meta)
    else:
        assert vision.config is not None
        config = vision_half(config_from(vision.config, "vision.config"))
        statistics = None
    if statistics is None:
        statistics = family_statistics(config.model_type)
        log.info("pixel mean and deviation of the family of '%s': %s, %s", config.model_type, *statistics)
    return config, layout_of(config, vision.layer, vision.select, statistics, vision.size)


def _text_config(language: LanguageSpec, tokenizer: PreTrainedTokenizerBase | None, meta: bool) -> PretrainedConfig:
    """The language model's configuration; one stated in a recipe takes what it leaves out from the tokenizer."""
    if language.source is not None:
        config = config_of(language.source, offline_first=meta)
        if hasattr(config, "text_config"):
            raise ValueError(
                f"language.from '{language.source}' is a '{config.model_type}', not a language model alone: "
                "use the whole checkpoint ('from'), or name a causal language model"
            )
        return config
    facts = dict(language.config or {})
    if tokenizer is not None:
        facts.setdefault("vocab_size", len(tokenizer))
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            facts.setdefault(token, getattr(tokenizer, token))
    return config_from(facts, "language.config")


def _llava_config(
    vision: PretrainedConfig,
    text: PretrainedConfig,
    layout: VisionLayout,
    image_id: int,
    spec: ModelSpec,
    dtype: torch.dtype,
) -> LlavaConfig:
    for part in (vision, text):
        part.dtype = dtype  # a checkpoint's own would make its submodule bf16
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=layout.placeholders,
        projector_hidden_act=spec.projector.activation,
        vision_feature_select_strategy=layout.select,
        vision_feature_layer=layout.layer,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    config.dtype = dtype
    return config


def _tower(vision: VisionSpec, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    if vision.source is None:
        return AutoModel.from_config(config, dtype=torch.float32).to(dtype)
    return pretrained_tower(vision.source, config, dtype)


def _language_model(language: LanguageSpec, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    if language.source is None:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    lm = pretrained(AutoModelForCausalLM.from_pretrained, language.source, dtype)
    require_plain_head(lm)
    return lm


def _assemble(
    config: LlavaConfig, tower: PreTrainedModel, lm: PreTrainedModel, init_std: float, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """A stock Llava that takes over the parts' tensors, strictly: every one, and no other."""
    with no_init_weights():
        model = LlavaForConditionalGeneration(config)
    body: Any = lm.base_model
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=True, assign=True)
    model.model.language_model.load_state_dict(body.state_dict(), strict=True, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    else:
        model.lm_head.load_state_dict(head_of(lm).state_dict(), strict=True, assign=True)
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        values = torch.zeros(parameter.shape)
        if name.endswith("weight"):
            values.normal_(mean=0.0, std=init_std)
        parameter.data = values.to(dtype)
    model.requires_grad_(True)
    return model


def _generation_config(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig:
    config = lm.generation_config or GenerationConfig()
    if tokenizer is not None:
        if config.eos_token_id is None:
            config.eos_token_id = tokenizer.eos_token_id
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    return config
