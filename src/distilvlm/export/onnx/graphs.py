"""Three graphs of a student: what sees, what embeds, and the language model with its cache.

vision_encoder          pixel_values [pictures, 3, size, size]
                        → image_features [pictures, placeholders, d], projected
embed_tokens            input_ids [batch, length]
                        → inputs_embeds [batch, length, d]
decoder_model_merged    inputs_embeds [batch, length, d], attention_mask [batch, past + length],
                        position_ids [batch, length], past_key_values.N.key, .value [batch, key heads, past, head]
                        → logits [batch, length, V], present.N.key, .value [batch, key heads, past + length, head]

All fp32. The first step of an answer has a past of length 0. Pictures, batch and lengths may be any.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache

from distilvlm.models.vlm import VLM

VISION, EMBEDDING, DECODER = "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"


class _Sees(nn.Module):
    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        model: Any = vlm.model
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.layer, self.first = vlm.layout.layer, int(vlm.layout.select == "default")

    def forward(self, pixel_values: Tensor) -> Tensor:
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        return self.projector(states[self.layer][:, self.first :])


class _Speaks(nn.Module):
    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.decoder, self.head = vlm.model.get_decoder(), vlm.model.lm_head

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        cache = DynamicCache([tuple(layer) for layer in past])
        output = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=_causal(attention_mask, inputs_embeds),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        kept = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return self.head(output.last_hidden_state), kept


_ANY: Any = Dim.DYNAMIC  # torch finds out by itself which sizes are sums of others


def write_graphs(vlm: VLM, directory: Path) -> None:
    """The files, for a model in fp32."""
    directory.mkdir()
    write_vision(vlm, directory / VISION)
    embedding: Any = vlm.model.get_input_embeddings()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    _export(embedding, (ids,), directory / EMBEDDING, ["input_ids"], ["inputs_embeds"], ({0: _ANY, 1: _ANY},))
    write_decoder(vlm, directory / DECODER)


def write_vision(vlm: VLM, path: Path) -> None:
    """Tower and projector."""
    pixels = torch.zeros(2, 3, vlm.layout.size, vlm.layout.size)
    _export(_Sees(vlm), (pixels,), path, ["pixel_values"], ["image_features"], ({0: _ANY},))


def write_decoder(vlm: VLM, path: Path) -> None:
    """The language model with its cache."""
    config: Any = vlm.model.config.get_text_config()
    width, heads = config.hidden_size, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    # Sizes that are unlike each other and no 0 or 1, so that nothing is taken for a constant.
    batch, length, past = 2, 3, 5
    layers = [[torch.zeros(batch, heads, past, head) for _ in range(2)] for _ in range(config.num_hidden_layers)]
    kept = [f"{{}}.{number}.{kind}" for number in range(len(layers)) for kind in ("key", "value")]
    _export(
        _Speaks(vlm),
        (
            torch.zeros(batch, length, width),
            torch.ones(batch, past + length, dtype=torch.int64),
            torch.arange(past, past + length).repeat(batch, 1),
            layers,
        ),
        path,
        ["inputs_embeds", "attention_mask", "position_ids", *(name.format("past_key_values") for name in kept)],
        ["logits", *(name.format("present") for name in kept)],
        (*[{0: _ANY, 1: _ANY} for _ in range(3)], [[{0: _ANY, 2: _ANY} for _ in layer] for layer in layers]),
    )


def _causal(mask: Tensor, embedded: Tensor) -> Tensor:
    """[batch, 1, length, past + length]: what is added to attention's logits, from what is real (1) and what is not.

    Made here, not by transformers, which leaves a mask out where it can and so looks at values that a graph has not.
    """
    length, whole = embedded.shape[1], mask.shape[1]
    read, asked = torch.arange(whole), torch.arange(length) + (whole - length)
    earlier = read[None, :] <= asked[:, None]  # [length, past + length]
    allowed = earlier[None, None] & mask[:, None, None, :].bool()
    return torch.zeros(allowed.shape, dtype=embedded.dtype).masked_fill(~allowed, torch.finfo(embedded.dtype).min)


def _export(
    module: nn.Module,
    inputs: tuple[Any, ...],
    path: Path,
    input_names: list[str],
    output_names: list[str],
    shapes: Any,
) -> None:
    import onnx_ir  # what onnxscript stands on

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of every operator it has no use for
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                module.eval(),
                inputs,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in which file of this machine each operator came from
    # Weights beside the graph, under the name that transformers.js looks for.
    onnx_ir.save(program.model, path, external_data=f"{path.name}_data")
