"""A VLM on disk: a stock Hugging Face checkpoint that loads without this package, and back.

Beside the stock files lies `distilvlm.json`, which only this package reads: how the tower sees, the geometry of its
pictures, and the number of embedding rows before one was added for `<image>`.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.image_processing_auto import get_image_processor_config

from distilvlm.errors import readable

from .files import MANIFEST, directory_whole, verify
from .image_token import place_image_token
from .merging import mergeable, merged_state
from .mixed_classes import stock_config
from .sources import config_of, host_facts, is_local, pretrained, tokenizer_of
from .towers import checkpoint_statistics, family_statistics, layout_of, vision_half
from .vlm import IMAGE_TOKEN, VLM, VisionLayout

log = logging.getLogger(__name__)

Geometry = Literal["square", "pad", "crop"]

OURS = "distilvlm.json"
FORMAT = 1


def save(
    vlm: VLM, directory: str | Path, geometry: Geometry, chat_template: str | None = None, replace: bool = False
) -> None:
    """Write a checkpoint that `AutoModelForImageTextToText` and `AutoProcessor` load without this package.

    Weights are written in the dtypes they are held in. `<image>` gets a row of zeros where it has none, in embedding
    and head, and generation never produces it. The model in memory stays as it is.

    Args:
        geometry: how the model's pictures became canvases; its image processor does the same, pixel for pixel with
            transformers' Pillow backend. 'pad' stands for padding with the mean colour, int(mean · 255).
        chat_template: Jinja of the processor and the tokenizer; default: the tokenizer's own, as it is.
        replace: take the place of an existing directory; otherwise one is refused.
    """
    with directory_whole(directory, replace=replace) as partial:
        write(vlm, partial, geometry, chat_template)
    log.info("saved %s", directory)


def write(vlm: VLM, directory: Path, geometry: Geometry, chat_template: str | None = None) -> None:
    """The files of `save`, into a directory that is there and that the caller makes whole."""
    if vlm.adaptors:
        raise ValueError(
            f"a stock checkpoint has no place for adaptors ({', '.join(vlm.adaptors)}): models.hosted.save writes them"
        )
    if vlm.tokenizer is None or vlm.model.device.type == "meta":
        raise ValueError("this model was built for a plan, without weights or tokenizer: there is nothing to save")
    tokenizer = copy.deepcopy(vlm.tokenizer)  # saving writes the processor's name into it
    tokenizer.padding_side = "left"  # what generating in batches needs; our own batches do not pad by the tokenizer
    tokenizer.init_kwargs["padding_side"] = "left"  # this is what gets written
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    exported = _exported(vlm)
    exported.generation_config = _generation(vlm, tokenizer)
    ours = {**facts_of(vlm.layout, geometry), "embedding_rows": vlm.embedding_rows}
    images = image_processor(vlm.layout, geometry)
    exported.save_pretrained(directory)
    exported.config.dtype = _widest(exported)  # save_pretrained took the dtype of the first weight
    exported.config.save_pretrained(directory)
    _processor(vlm.layout, images, tokenizer).save_pretrained(directory)
    images.save_pretrained(directory)  # the same settings where programs before transformers 5 look for them
    (directory / OURS).write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")


def load(path: str | Path, dtype: torch.dtype = torch.float32, meta: bool = False) -> VLM:
    """A checkpoint of ours, or one in LLaVA's transformers format (`llava-hf/...`): a directory or a hub id. Of a
    directory of adaptors (hosted.py) it is their base with them, none of which is active.

    Args:
        dtype: what all weights are held in.
        meta: without weights, on the meta device, for a plan.

    Raises:
        NotHere: a path at which nothing is.
        ValueError: not a Llava; pickled weights; a tensor missing, left over or of another shape; a damaged directory.
    """
    with readable(path):
        return _load(str(path), dtype, meta)


def _load(source: str, dtype: torch.dtype, meta: bool) -> VLM:
    local = is_local(source)
    if local and host_facts(source) is not None:
        from . import hosted  # it builds its base, which may be a checkpoint

        return hosted.load(source, dtype, meta)
    if local and (Path(source) / MANIFEST).exists() and (problems := verify(source, contents=False)):
        raise ValueError("the checkpoint is damaged:\n  " + "\n  ".join(problems))
    config = _llava_config(source, meta)
    tokenizer = tokenizer_of(source, plan=meta)
    if meta:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(copy.deepcopy(config))
    else:
        model = pretrained(_from_pretrained, source, dtype)
    ours = _ours(source) if local else None
    if ours is not None:
        layout = _layout(ours)
        _cut_rows(model, ours["embedding_rows"])
    else:
        layout = _foreign_layout(source, config)
    image_id = config.image_token_index
    vlm = VLM(model, tokenizer, layout, image_id)
    rows = vlm.embedding_rows
    if tokenizer is not None and place_image_token(tokenizer, rows) != image_id:
        raise ValueError(
            f"{source}: the model takes id {image_id} for a picture, its tokenizer gives {IMAGE_TOKEN} the id "
            f"{tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}"
        )
    if image_id >= rows:  # no logit to suppress
        generation = cast(GenerationConfig, model.generation_config)
        generation.suppress_tokens = [i for i in generation.suppress_tokens or [] if i != image_id] or None
    model.eval()
    return vlm


def facts_of(layout: VisionLayout, geometry: Geometry) -> dict[str, Any]:
    """What we write beside the stock files."""
    return {
        "format": FORMAT,
        "geometry": geometry,
        "layout": asdict(layout),
        "versions": {name: importlib.metadata.version(name) for name in ("distilvlm", "torch", "transformers")},
    }


def layout_in(directory: str | Path) -> VisionLayout | None:
    """How the tower of a directory sees, if this package wrote it."""
    ours = _ours(str(directory))
    return None if ours is None else _layout(ours)


def stated_dtype(config: PretrainedConfig) -> torch.dtype:
    """What a checkpoint's weights are to be held in: with several of them, the widest, which loses nothing."""
    dtype = config.dtype or config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def processor_template(source: str) -> str | None:
    """The chat template of a Llava's processor, which others keep apart from the tokenizer's."""
    return getattr(AutoProcessor.from_pretrained(source), "chat_template", None)


def geometry_of(path: str | Path) -> Geometry:
    """How pictures become canvases for a saved model: as it was saved, or as its image processor does."""
    with readable(path):
        if is_local(str(path)) and (ours := host_facts(path) or _ours(str(path))):
            return ours["geometry"]
        settings = dict(get_image_processor_config(str(path)))
    if settings.get("do_pad"):
        return "pad"
    size = settings.get("size")
    keeps_shape = isinstance(size, int) or "shortest_edge" in (size or {})
    return "crop" if keeps_shape and settings.get("do_center_crop", True) else "square"


def _exported(vlm: VLM) -> LlavaForConditionalGeneration:
    """A model of its own that shares the tensors of this one, but for embedding and head if they get a row."""
    rows = max(vlm.embedding_rows, vlm.image_id + 1)
    config = copy.deepcopy(vlm.model.config)
    config.get_text_config().vocab_size = rows
    config.image_token_index = vlm.image_id
    config.image_seq_length = vlm.layout.placeholders
    config.vision_feature_select_strategy = vlm.layout.select
    config.vision_feature_layer = vlm.layout.layer
    merges = mergeable(vlm.model)
    if merges:
        config.vision_config = stock_config(cast(PretrainedConfig, config.vision_config))
    with torch.device("meta"), no_init_weights():
        model = LlavaForConditionalGeneration(config)
    vocabulary = {id(vlm.model.get_input_embeddings().weight), id(vlm.model.get_output_embeddings().weight)}
    names = {name for name, value in vlm.model.named_parameters(remove_duplicate=False) if id(value) in vocabulary}
    state: dict[str, Tensor] = merged_state(vlm.model) if merges else vlm.model.state_dict()
    for name in names:
        state[name] = _grown(state[name], rows)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model


def _grown(weight: Tensor, rows: int) -> Tensor:
    missing = rows - weight.shape[0]
    return torch.cat([weight, weight.new_zeros(missing, weight.shape[1])]) if missing else weight


def _from_pretrained(source: str, **options: Any) -> Any:
    # Another shape is then reported with the missing and unknown keys, by name; `pretrained` refuses all three.
    return LlavaForConditionalGeneration.from_pretrained(source, ignore_mismatched_sizes=True, **options)


def _cut_rows(model: LlavaForConditionalGeneration, rows: int) -> None:
    """Take embedding and head back to `rows` rows."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    head = cast(nn.Linear, model.get_output_embeddings())
    tied = head.weight is embedding.weight
    if embedding.num_embeddings <= rows:
        return
    embedding.weight = nn.Parameter(embedding.weight.detach()[:rows].clone())
    head.weight = embedding.weight if tied else nn.Parameter(head.weight.detach()[:rows].clone())
    embedding.num_embeddings = head.out_features = rows
    model.config.get_text_config().vocab_size = rows


def _widest(model: nn.Module) -> torch.dtype:
    """What the checkpoint says its dtype is: loading a mixed one in it loses nothing."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    widest = torch.bfloat16 if torch.bfloat16 in dtypes else next(iter(dtypes))
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _generation(vlm: VLM, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's own settings, which stop where its template ends a turn, and never produce `<image>`."""
    config = copy.deepcopy(vlm.model.generation_config) or GenerationConfig()
    config._from_model_config = False  # else generate() makes one anew from the model's, without what is set here
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = [stop for stop in (*stops, tokenizer.eos_token_id, _end_of_turn(tokenizer)) if stop is not None]
    stops = list(dict.fromkeys(stops))
    config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    config.pad_token_id = tokenizer.pad_token_id
    config.suppress_tokens = sorted({*(config.suppress_tokens or []), vlm.image_id})
    return config


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes behind an answer, if any."""
    if not tokenizer.chat_template:
        return None
    answer = "answer"
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(talk, tokenize=False))
    except Exception as problem:  # a template can raise anything; it then says nothing about where to stop
        log.warning("the chat template does not render a plain question and answer: %s", problem)
        return None
    behind = text.rpartition(answer)[2].strip()
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [number for token, number in special.items() if behind.startswith(token)]
    return ends[0] if ends else None


def image_processor(layout: VisionLayout, geometry: Geometry) -> Any:
    """A stock image processor that makes of a picture what the tower was trained on."""
    square = {"height": layout.size, "width": layout.size}
    settings: dict[str, Any] = {
        "image_mean": list(layout.mean),
        "image_std": list(layout.std),
        "resample": 3,  # bicubic
        "size": square,
        "crop_size": square,
        "do_center_crop": False,
    }
    if geometry == "pad":
        return LlavaImageProcessorPil(**settings, do_pad=True)
    if geometry == "crop":
        settings |= {"size": {"shortest_edge": layout.size}, "do_center_crop": True}
    return CLIPImageProcessorPil(**settings)


def _processor(layout: VisionLayout, images: Any, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Expands each `<image>` to (size // patch)² + additional tokens, less one for the strategy 'default'."""
    dropped = 1 if layout.select == "default" else 0
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=layout.patch,
        vision_feature_select_strategy=layout.select,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=layout.placeholders + dropped - (layout.size // layout.patch) ** 2,
    )


def _llava_config(source: str, plan: bool) -> LlavaConfig:
    config = config_of(source, offline_first=plan)
    if not isinstance(config, LlavaConfig):
        raise ValueError(
            f"{source} is a '{config.model_type}', not a 'llava': a language model or an encoder alone is a part "
            "('language.from', 'vision.from'), and other vision-language models are not supported"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"{source} reads several layers of its tower ({config.vision_feature_layer}), which is not supported"
        )
    return config


def _ours(source: str) -> dict[str, Any] | None:
    file = Path(source) / OURS
    if not file.exists():
        return None
    with readable(file):
        ours: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    if ours.get("format") != FORMAT:
        raise ValueError(f"{file} has format {ours.get('format')}, this version reads {FORMAT}: update distilvlm")
    return ours


def _layout(ours: dict[str, Any]) -> VisionLayout:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in ours["layout"].items()}
    return VisionLayout(**fields)


def _foreign_layout(source: str, config: LlavaConfig) -> VisionLayout:
    tower = vision_half(cast(Any, config.vision_config))
    layer, select = config.vision_feature_layer, config.vision_feature_select_strategy
    statistics = checkpoint_statistics(source) or family_statistics(tower.model_type)
    settings = get_image_processor_config(source)
    cropped = settings.get("do_center_crop", "crop_size" in settings)
    side = settings.get("crop_size" if cropped else "size")
    if isinstance(side, dict):
        side = side.get("height") or side.get("shortest_edge")
    return layout_of(tower, cast(int, layer), select, statistics, side)
