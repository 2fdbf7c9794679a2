"""The hash of a model's weights: what says that two models, or a model and a file made with it, belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

PIECE = 1 << 26  # bytes that are brought from the device and hashed at a time


def fingerprint(
    model: nn.Module,
    exclude: Collection[str] = (),
    beside: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """SHA-256, hexadecimal, of every weight's name, dtype, shape and bytes, buffers that are saved included.

    The order in which modules were registered, the device and what trains do not count.

    Args:
        exclude: names of `state_dict` entries to leave out, e.g. what trains. An entry that shares its memory with an
            excluded one (a tied head) is left out with it.
        beside: weights that count, too, and that are not the model's own: its adaptors'.
        dtype: as if parameters and buffers of floats were held in it.

    Raises:
        ValueError: `exclude` names something that is not there, or the model is on the meta device.
    """
    state: dict[str, Tensor] = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    state |= beside or {}
    unknown = sorted(set(exclude) - set(state))
    if unknown:
        raise ValueError(f"no weight of this model is named {', '.join(unknown)}")
    left_out = {_place(state[name]) for name in exclude if state[name].numel()}
    digest = hashlib.sha256()
    for name in sorted(set(state) - set(exclude)):
        tensor = state[name].detach()
        if tensor.is_meta:
            raise ValueError(f"'{name}' has no values (meta device), so there is nothing to hash")
        if tensor.numel() and _place(tensor) in left_out:
            continue
        held = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        digest.update(f"{name}\0{held}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.reshape(-1)
        for piece in flat.split(max(1, PIECE // tensor.element_size())):
            digest.update(piece.to(held).cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.data_ptr()
