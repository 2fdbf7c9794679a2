"""Which kernel multiplies a linear layer's weight on a CPU.

torch multiplies fp32 by MKL; it holds oneDNN as well, which its compiler uses. MKL leaves half of what an AMD
processor can do: with 1,024 rows of SmolLM2-360M's widths an EPYC with AVX-512 takes 15 ms instead of 32 for a feed-
forward's product on two cores, and a student over SmolLM2-135M reads prompts of 60 tokens in 0.52 to 0.56 of the time
on one. Results differ by the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from .vlm import VLM


@contextmanager
def faster_linear(vlm: VLM) -> Iterator[int]:
    """Inside, plain linear layers that are held in fp32 on a CPU run through oneDNN, where torch has it, without
    gradients: gives how many."""
    chosen: list[nn.Linear] = []
    if torch.backends.mkldnn.is_available():
        modules = [module for tree in vlm.trees for module in tree.modules() if type(module) is nn.Linear]
        chosen = [module for module in modules if _fits(module.weight) and "forward" not in vars(module)]
    for module in chosen:
        setattr(module, "forward", partial(_multiplied, module))  # noqa: B010 - of this instance, its class's stays
    try:
        yield len(chosen)
    finally:
        for module in chosen:
            del module.forward


def _fits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _multiplied(module: nn.Linear, given: Tensor) -> Tensor:
    empty = not given.numel()  # a workflow that has no rows in this batch
    if empty or given.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return functional.linear(given, module.weight, module.bias)
    return torch.ops.mkldnn._linear_pointwise(given, module.weight, module.bias, "none", [], "")
