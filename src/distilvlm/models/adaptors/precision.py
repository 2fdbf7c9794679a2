"""Hosts whose weights are quantised: telling them, and the full-precision weights from which inserted layers come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..sources import NotHere, refuse_pickled

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_plain(module: nn.Module) -> bool:
    """True where all weights are ordinary floating-point tensors, so that a copy of the module can train.

    Quantisers hold packed integers (bitsandbytes, GPTQ, AWQ), 8-bit floats, subclasses of Tensor (torchao), or things
    that are no tensors (torch.ao).
    """
    state = module.state_dict(keep_vars=True)
    return bool(state) and all(type(v) in (Tensor, nn.Parameter) and v.dtype in _PLAIN for v in state.values())


class FullPrecision:
    """A base's weights from before it was quantised: a state dict, or a directory of safetensors read in pieces."""

    def __init__(self, source: Mapping[str, Tensor] | str | Path) -> None:
        self._state: dict[str, Tensor] | None = None
        self._files: dict[str, Path] = {}  # tensor -> its file
        if isinstance(source, Mapping):
            self._state, self._told = dict(source), "the state dict"
            return
        directory = Path(source)
        if not directory.is_dir():
            raise NotHere(directory)
        refuse_pickled(directory)
        self._told = str(directory)
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as content:
                self._files |= dict.fromkeys(content.keys(), file)

    def tensors(self, places: Sequence[str], names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights of one module, each a copy in `dtype`.

        Args:
            places: what the module may be called in the whole model; the first that is there counts.
            names: of its weights.

        Raises:
            ValueError: one of them is not there.
        """
        there = self._files if self._state is None else self._state
        place = next((place for place in places if f"{place}.{names[0]}" in there), places[0])
        lacking = [f"{place}.{name}" for name in names if f"{place}.{name}" not in there]
        if lacking:
            raise ValueError(f"{self._told} lacks {len(lacking)} tensors that an adaptor starts from: {lacking[:3]}")
        return {name: self._read(f"{place}.{name}").to(dtype, copy=True) for name in names}

    def _read(self, name: str) -> Tensor:
        if self._state is not None:
            return self._state[name].detach()
        with safe_open(self._files[name], framework="pt") as content:
            return content.get_tensor(name)
