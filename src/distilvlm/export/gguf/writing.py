"""GGUF files: metadata, and tensors in the type that a file is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Type = Literal["f16", "q8_0", "q4_0"]

BLOCK = 32
"""Values that share a scale; a row whose length is no multiple of it stays f16."""

_ONE_BETTER: dict[Type, Type] = {"f16": "f16", "q8_0": "q8_0", "q4_0": "q8_0"}
"""Of embedding and head, which rounding hurts most (llama.cpp's own quantiser keeps more bits for them, too)."""


def type_of(weight: Tensor, wanted: Type, vocabulary: bool = False) -> str:
    """What a tensor is held in: norms and biases f32, matrices as asked."""
    if weight.ndim < 2:
        return "f32"
    kind = _ONE_BETTER[wanted] if vocabulary else wanted
    return kind if weight.shape[-1] % BLOCK == 0 else "f16"


class Writer:
    """One file; the `gguf` package lays it out."""

    def __init__(self, path: Path, architecture: str, wanted: Type) -> None:
        import gguf

        self._gguf = gguf
        self._writer = gguf.GGUFWriter(path, architecture)
        self.wanted: Type = wanted
        names = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
        self._writer.add_file_type(gguf.LlamaFileType[names[wanted]])

    @property
    def facts(self) -> Any:
        """The package's writer, whose `add_...` methods are metadata."""
        return self._writer

    def add(self, name: str, weight: Tensor, kind: str | None = None, vocabulary: bool = False) -> None:
        """A tensor; `kind` instead of what `type_of` says.

        Raises:
            ValueError: a value that f16 has no place for.
        """
        kind = kind or type_of(weight, self.wanted, vocabulary)
        values = weight.detach().float().contiguous().numpy()
        if kind in ("f32", "f16"):
            with np.errstate(over="ignore"):  # refused below, by name
                stored = values.astype(np.float32 if kind == "f32" else np.float16)
            if not np.isfinite(stored).all():
                raise ValueError(f"{name} holds a value that is not finite in {kind}: it can't be written")
            self._writer.add_tensor(name, stored)
            return
        quantised = self._gguf.GGMLQuantizationType[kind.upper()]
        self._writer.add_tensor(name, self._gguf.quants.quantize(values, quantised), raw_dtype=quantised)

    def close(self) -> None:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()


def held(weight: Tensor, wanted: Type, vocabulary: bool = False) -> Tensor:
    """The values that a file of type `wanted` holds for a weight, in fp32."""
    import gguf

    kind = type_of(weight, wanted, vocabulary)
    values = weight.detach().float().contiguous()
    if kind == "f32":
        return values
    if kind == "f16":
        return values.half().float()
    quantised = gguf.GGMLQuantizationType[kind.upper()]
    data = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), quantised), quantised)
    return torch.from_numpy(np.ascontiguousarray(data))
