"""A language model alone, in the form in which this package asks models: as a VLM that sees nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from . import save
from .image_token import place_image_token
from .language import require_plain_head
from .sources import config_of, host_facts, pretrained, tokenizer_of
from .vlm import VLM, VisionLayout

BLIND = VisionLayout(0, 0, 0, (), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "full", -1)
"""The layout of a model without a tower: no placeholders, so a batch with pictures is refused."""


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> VLM:
    """What text is asked of: a VLM, one with adaptors, or a plain causal language model; a directory or a hub id.

    Args:
        dtype: what all weights are held in.

    Raises:
        NotHere: a path at which nothing is.
        ValueError: a language model whose logits are not its head's weight times its hidden states; as `save.load`.
    """
    source = str(path)
    if host_facts(source) is not None or isinstance(config_of(source, offline_first=False), LlavaConfig):
        return save.load(source, dtype)
    model: Any = pretrained(AutoModelForCausalLM.from_pretrained, source, dtype)
    require_plain_head(model)
    model.eval()
    tokenizer = tokenizer_of(source, plan=False)
    assert tokenizer is not None  # only a plan may lack one
    image_id = place_image_token(tokenizer, model.get_input_embeddings().weight.shape[0])
    # All that running text needs of a Llava, it has: embeddings, a decoder, a head, a configuration.
    return VLM(cast(LlavaForConditionalGeneration, model), tokenizer, BLIND, image_id)
