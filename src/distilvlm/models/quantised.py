"""A frozen model whose language model's matrices are held in 8 or 4 bits, by bitsandbytes (`distilvlm[quantised]`).

Only linear layers within the language model's layers are: embedding and output head are what losses multiply with, the
tower may be shared with a student, and norms and projector are small. All else stays in bf16, which is also what
products run in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .vlm import VLM

Bits = Literal["8bit", "4bit"]

INSTALL = "pip install 'distilvlm[quantised]'"

THRESHOLD = 6.0
"""Of activations in 8 bits: features beyond it are multiplied in 16 (LLM.int8, arXiv 2208.07339)."""

BLOCK, BLOCKS = 64, 256
"""Of NF4: weights that share a scale, and scales that share one of their own (QLoRA, arXiv 2305.14314)."""

LINEAR = 0.9
"""Share of the layers' weights that must be of linear layers: those of experts are not."""


def require_possible(precision: Bits, device: torch.device) -> None:
    """Find out by trying one matrix. Raises ValueError where library or device can't, with what to do."""
    try:
        found = _made(nn.Linear(BLOCK, BLOCK, dtype=torch.bfloat16), precision, device)
        with torch.no_grad():
            found(torch.ones(2, BLOCK, dtype=torch.bfloat16, device=device))
    except ImportError as error:
        raise ValueError(
            f"teacher.precision: {precision} needs bitsandbytes ({error}): {INSTALL}, or set teacher.precision to bf16"
        ) from None
    except Exception as error:  # whatever a library says on a device that it was not made for
        raise ValueError(_cannot(precision, device, error)) from error


@torch.no_grad()
def quantise(vlm: VLM, precision: Bits, device: torch.device) -> None:
    """Take the matrices of the language model's layers to `device`, in so many bits; all else stays where it is.

    Args:
        vlm: on the CPU in bf16; it changes in place, and never trains again.

    Raises:
        ValueError: library or device can't, or most of the layers' weights are of no linear layers.
    """
    require_possible(precision, device)
    require_linear(vlm)
    for parent, name, layer in list(_linear_layers(vlm)):
        setattr(parent, name, _made(layer, precision, device))  # one by one: both forms of one matrix at a time
    vlm.model.eval()


def require_linear(vlm: VLM) -> None:
    """Raises ValueError for a language model of which the greater part would stay as it is."""
    inside = sum(layer.weight.numel() for _, _, layer in _linear_layers(vlm))
    every = sum(parameter.numel() for parameter in _layers(vlm).parameters())
    if inside < LINEAR * every:
        kind = vlm.model.config.get_text_config().model_type
        raise ValueError(
            f"only {inside / every:.0%} of the weights in the layers of this '{kind}' are of linear layers, and "
            "bitsandbytes holds no others (experts) in 8 or 4 bits: set teacher.precision to bf16"
        )


def bits_of(vlm: VLM) -> Bits | None:
    """How the matrices of a model's layers are held; None where they are not quantised."""
    kinds = {type(module).__name__ for module in _layers(vlm).modules()}
    return "8bit" if "Linear8bitLt" in kinds else "4bit" if "Linear4bit" in kinds else None


def saved_bytes(vlm: VLM, precision: Bits) -> int:
    """What a model takes less than in bf16; known without weights."""
    return sum(2 * layer.weight.numel() - _held(layer, precision) for _, _, layer in _linear_layers(vlm))


def _held(layer: nn.Linear, precision: Bits) -> int:
    """Bytes of one matrix."""
    numbers = layer.weight.numel()
    if precision == "8bit":
        return numbers + 4 * layer.out_features  # a scale for each row
    blocks = -(-numbers // BLOCK)
    tables = 4 * (16 + 256)  # what 4 and 8 bits stand for
    return -(-numbers // 2) + blocks + 4 * -(-blocks // BLOCKS) + tables


def _layers(vlm: VLM) -> nn.Module:
    decoder: Any = vlm.model.get_decoder()
    return decoder.layers


def _linear_layers(vlm: VLM) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in _layers(vlm).modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, name, child


def _made(layer: nn.Linear, precision: Bits, device: torch.device) -> nn.Module:
    """A layer in so many bits, on `device`."""
    library = _library()
    shape: dict[str, Any] = {
        "input_features": layer.in_features,
        "output_features": layer.out_features,
        "bias": layer.bias is not None,
        "device": "meta",
    }
    weight: Tensor = layer.weight.detach().to("cpu", torch.bfloat16)
    made: Any
    if precision == "8bit":
        made = library.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=THRESHOLD)
        made.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        how: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
        made = library.nn.Linear4bit(**shape, compute_dtype=torch.bfloat16, **how)
        # Else the first forward on a CPU would round the scales, and a hash of the weights would be another one.
        made.support_avx512bf16_for_cpu = False
        made.weight = library.nn.Params4bit(weight, requires_grad=False, blocksize=BLOCK, module=made, **how).to(device)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(device, torch.bfloat16), requires_grad=False)
    return made.eval()


def _library() -> Any:
    # It tells of kernels that could be downloaded, and at every matrix that its 8 bits go through fp16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def _cannot(precision: Bits, device: torch.device, error: Exception) -> str:
    return (
        f"bitsandbytes can't multiply in {precision} on {device} ({type(error).__name__}: {error}): set "
        "teacher.precision to bf16, or teacher.device to a device that it knows"
    )
