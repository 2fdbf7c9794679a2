"""Several samples in one line, where attention is block-diagonal and causal: what a sample gets is what it gets alone.

Positions begin anew with each sample. transformers takes that for a mask of blocks (without an attention mask and a
cache), which is exact, for sliding windows, too, and computes the whole square of a line. Where it would run SDPA, ours
cuts the line into its samples instead and runs the same SDPA on each: without a mask, and in the sum of the samples'
squares. The mask stays for layers that look at less than a whole sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .vlm import VLM

IMPLEMENTATION = "sdpa_by_sample"
"""Name for transformers' attention implementations. A decoder that ran on a packed line has it from then on, so that
gradient checkpointing runs a layer again as it ran before; a call without `cuts` is SDPA's own, bit for bit."""

TRIED = 8
"""Positions of each sequence that a language model is tried on."""


def decoder_arguments(decoder: Any, sizes: Sequence[int], length: int, device: torch.device) -> dict[str, Any]:
    """What a decoder is called with, beside embeddings [1, length, d], for samples of `sizes` one behind the other.

    Padding behind the last is a sample like others: attention to nothing may be NaN.
    """
    sizes = [size for size in (*sizes, length - sum(sizes)) if size]
    if decoder.config._attn_implementation == "sdpa":
        decoder.config._attn_implementation = IMPLEMENTATION
    positions = torch.cat([torch.arange(size) for size in sizes]).unsqueeze(0).to(device)  # [1, length]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return {"attention_mask": None, "position_ids": positions, "cuts": (0, *ends)}


def _by_sample(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cuts: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Queries, keys and values [1, heads, length, d_head] → [1, length, heads, d_head]."""
    if cuts is None or options.get("sliding_window") is not None or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts: list[Tensor] = []
    for own in (slice(start, end) for start, end in pairwise(cuts)):
        q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
        parts.append(sdpa_attention_forward(module, q, k, v, None, **options)[0])
    return torch.cat(parts, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _by_sample)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)


@torch.no_grad()
def require_packable(vlm: VLM, who: str) -> None:
    """The language model keeps sequences of one line apart; found out by trying two of random embeddings.

    Args:
        who: for the message: "student", "teacher".

    Raises:
        ValueError: it does not, as one with a recurrent state or positions of its own.
    """
    decoder: Any = vlm.model.get_decoder()
    table: Tensor = vlm.model.get_input_embeddings().weight  # pyright: ignore
    ids = torch.arange(2 * TRIED, device=table.device) * 7 % table.shape[0]
    given = nn.functional.embedding(ids, table).view(2, TRIED, -1)  # [sequences, positions, d]
    trained = vlm.model.training
    for tree in vlm.trees:
        tree.eval()  # without dropout
    try:
        alone = decoder(inputs_embeds=given, use_cache=False).last_hidden_state
        arguments = decoder_arguments(decoder, (TRIED, TRIED), 2 * TRIED, table.device)
        packed = decoder(inputs_embeds=given.view(1, 2 * TRIED, -1), use_cache=False, **arguments).last_hidden_state
    finally:
        for tree in vlm.trees:
            tree.train(trained)
    alone, packed = alone.flatten(0, 1).float(), packed[0].float()  # [2 * positions, d]
    apart = float((alone - packed).norm() / alone.norm())
    # Rounding alone makes less of a difference, another sequence in sight far more.
    if not apart < (1e-3 if table.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"the {who}'s language model ({decoder.config.model_type}) can't be packed: a sequence behind another one "
            f"in the same line comes out as something else (by {apart:.2g} of its norm). Set machine.packing to false"
        )
