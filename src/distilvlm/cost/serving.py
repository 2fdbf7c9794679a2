"""What it costs to use a model on this machine: parameters, bytes, tokens per second, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from distilvlm.models.sparse_checkpoint import random_text
from distilvlm.models.upcycling import active_parameters

from .meter import Meter, resident_bytes
from .numbers import as_bytes

REPEATS = 3


@dataclass(frozen=True)
class Serving:
    """Of one text at a time, in the dtype that the weights are held in. Pictures are not in it: the tower's work is the
    same for a dense model and its sparse twin."""

    parameters: int
    active_parameters: int  # that serve one token
    weight_bytes: int
    prefill: float  # tokens per second that a prompt is read with
    decoding: float  # tokens per second that greedy decoding writes behind it
    peak_memory_bytes: int | None  # weights and what running adds; None where the system does not tell


def serving(model: PreTrainedModel, prompt: int = 256, new: int = 64) -> Serving:
    """Measure a causal language model or a stock Llava, on the device where it is.

    Args:
        prompt: tokens that are read.
        new: tokens that are written; every step takes the likeliest, whatever it is.
    """
    model.eval()
    weights = _own_memory(model)
    ids = random_text(model, 1, prompt)
    meter = Meter(model.device)
    _generate(model, ids, 1)  # warms up
    meter.start()
    before = torch.cuda.memory_allocated() if model.device.type == "cuda" else resident_bytes()
    runs = [_generate(model, ids, new) for _ in range(REPEATS)]
    peak = meter.measured().peak_memory_bytes
    total, active = active_parameters(model)
    return Serving(
        parameters=total,
        active_parameters=active,
        weight_bytes=weights,
        prefill=prompt / statistics.median(first for first, _ in runs),
        decoding=new / statistics.median(rest for _, rest in runs),
        peak_memory_bytes=None if peak is None else weights + max(0, peak - before),
    )


def serving_table(models: Mapping[str, Serving], where: str) -> Table:
    """A row per model; `where` names the machine."""
    drawn = Table(caption=f"one text at a time, on {where}", caption_justify="left")
    drawn.add_column("model")
    for column in ("parameters", "active", "weights", "prefill, tokens/s", "decoding, tokens/s", "peak memory"):
        drawn.add_column(column, justify="right")
    for name, one in models.items():
        peak = "–" if one.peak_memory_bytes is None else as_bytes(one.peak_memory_bytes)
        drawn.add_row(
            name,
            _count(one.parameters),
            _count(one.active_parameters),
            as_bytes(one.weight_bytes),
            f"{one.prefill:,.0f}",
            f"{one.decoding:,.1f}",
            peak,
        )
    return drawn


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e6 else f"{parameters:,}"


@torch.no_grad()
def _generate(model: PreTrainedModel, ids: Tensor, new: int) -> tuple[float, float]:
    """Seconds of reading a prompt, and of writing `new` tokens."""
    cache = DynamicCache(config=model.config.get_text_config())

    def run(given: Tensor) -> Tensor:
        logits = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    start = _now(model)
    chosen = run(ids)  # [1, 1]
    read = _now(model)
    for _ in range(new):
        chosen = run(chosen)
    return read - start, _now(model) - read


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _own_memory(model: nn.Module) -> int:
    """Take weights out of the file that they may be mapped from, which would count as far as it was read; returns their
    bytes. Tied ones stay one."""
    moved: dict[int, Tensor] = {}
    for parameter in model.parameters():
        if id(parameter) not in moved:
            parameter.data = moved[id(parameter)] = parameter.data.clone()
    return sum(tensor.numel() * tensor.element_size() for tensor in moved.values())
