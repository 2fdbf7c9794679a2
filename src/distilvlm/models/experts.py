"""How the experts of a sparse block multiply: transformers' grouped products, but in autocast's dtype where it is on.

Stock Qwen2Moe leaves that open (`set_experts_implementation`), and of its own ways `grouped_mm` is the fastest in fp32.
But autocast does not know the product behind it: weights held in fp32, as everything is that trains, are multiplied in
fp32, at several times the cost. So autocast is applied here: on a CPU by one expert after the other, elsewhere by
giving the stock way weights in autocast's dtype. Figures: `benchmarks/sparse_layer.py`.

The choice belongs to a model in memory. Checkpoints do not mention it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

IMPLEMENTATION = "autocast_grouped_mm"
"""Name for transformers' `set_experts_implementation`; known where this module is imported."""


def forward(self: nn.Module, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """What a stock block's experts give its tokens together, [tokens, d] in the dtype of `hidden`.

    Args:
        self: the stock module of the experts, with `gate_up_proj` [E, 2 inner, d] and `down_proj` [E, d, inner].
        hidden: [tokens, d].
        experts, weights: [tokens, k], those that serve each token.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return grouped_mm_experts_forward(self, hidden, experts, weights)
    return (in_turn if device == "cpu" else at_once)(self, hidden, experts, weights, torch.get_autocast_dtype(device))


def in_turn(self: Any, hidden: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`forward` under autocast, one expert after the other on its own tokens."""
    tokens, top_k = experts.shape
    chosen = experts.flatten()  # [k * tokens]
    order = chosen.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
    pieces = hidden.to(dtype)[order // top_k].split(counts)  # [tokens of an expert, d] each
    # Taken apart at once: picking one expert after the other makes a gradient of the size of all of them for each. And
    # gates apart from ups: their common product would have to be put together again going backward.
    halves = self.gate_up_proj.to(dtype).unflatten(1, (2, -1)).flatten(0, 1).unbind()  # [inner, d] each
    downs = self.down_proj.to(dtype).unbind()
    served: list[Tensor] = []
    for piece, gate, up, down in zip(pieces, halves[::2], halves[1::2], downs, strict=True):
        if piece.shape[0]:
            inner = self.act_fn(nn.functional.linear(piece, gate)) * nn.functional.linear(piece, up)
            served.append(nn.functional.linear(inner, down))
    each = torch.cat(served)[places].view(tokens, top_k, -1)
    return (each * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


def at_once(self: nn.Module, hidden: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`forward` under autocast, by the stock product of all experts; nothing is read from the device."""
    with torch.autocast(hidden.device.type, enabled=False):
        cast = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}
        return functional_call(self, cast, (hidden.to(dtype), experts, weights)).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
