"""What this process holds of tensors that are split over processes, row by row of their first dimension (FSDP2)."""

from __future__ import annotations

import math

from torch import Size, Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is split; all of any other."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(tensor: Tensor) -> slice:
    """Which rows of the whole tensor `local` is: as `torch.chunk` splits them, so the last processes may have none."""
    rows = tensor.shape[0] if tensor.ndim else 0
    if not isinstance(tensor, DTensor):
        return slice(0, rows)
    each = _each(rows, tensor.device_mesh.size())
    first = min(tensor.device_mesh.get_local_rank() * each, rows)
    return slice(first, min(first + each, rows))


def most(shape: Size, processes: int) -> int:
    """How many numbers of a tensor the first of so many processes holds, if it is split: none holds more."""
    return _each(shape[0], processes) * math.prod(shape[1:])


def _each(rows: int, processes: int) -> int:
    return -(-rows // processes)
