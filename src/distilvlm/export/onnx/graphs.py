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


def write_graphs(vlm: VLM, directory: Path) -> None:
    """The files, for a model in fp32, which keeps its weights and its attention."""
    directory.mkdir()
    config: Any = vlm.model.config.get_text_config()
    size, width, heads = vlm.layout.size, config.hidden_size, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    any_size: Any = Dim.DYNAMIC  # torch finds out by itself which of them are sums of others
    # Sizes that are unlike each other and no 0 or 1, so that nothing is taken for a constant.
    layers = [[torch.zeros(2, heads, 5, head) for _ in range(2)] for _ in range(config.num_hidden_layers)]
    kept = [f"{{}}.{number}.{kind}" for number in range(len(layers)) for kind in ("key", "value")]
    _export(
        _Sees(vlm),
        (torch.zeros(2, 3, size, size),),
        directory / VISION,
        ["pixel_values"],
        ["image_features"],
        ({0: any_size},),
    )
    _export(
        vlm.model.get_input_embeddings(),
        (torch.zeros(2, 3, dtype=torch.int64),),
        directory / EMBEDDING,
        ["input_ids"],
        ["inputs_embeds"],
        ({0: any_size, 1: any_size},),
    )
    _export(
        _Speaks(vlm),
        (
            torch.zeros(2, 3, width),
            torch.ones(2, 8, dtype=torch.int64),
            torch.arange(5, 8).repeat(2, 1),
            layers,
        ),
        directory / DECODER,
        ["inputs_embeds", "attention_mask", "position_ids", *(name.format("past_key_values") for name in kept)],
        ["logits", *(name.format("present") for name in kept)],
        (
            *[{0: any_size, 1: any_size} for _ in range(3)],
            [[{0: any_size, 2: any_size} for _ in layer] for layer in layers],
        ),
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
