"""The visit of a chunk's logits as one kernel, for CUDA devices with Triton (which torch's CUDA builds bring along).

What `linear.py` does to a tile of logits in a dozen passes takes two here for forward KL and three for the others: sums
over each row's ids, then the gradient over its logits. On a GPU each pass goes through memory, and a dozen of them cost
more than the matrix products around them. Formulas are those of `divergences.py`.
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distilvlm.losses.divergences import JENSEN_SHANNON_MIX, SKEW

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl")
"""Divergences that have a kernel, in the order of its `KIND`. `uld` sorts, which a pass over a row can't."""

BLOCK = 2048
"""Ids that a program holds at a time."""

PARTS = 8
"""Programs that share the sums of a row."""

WARPS = 4


@dataclass(frozen=True)
class Kernel:
    """The kernel of one divergence."""

    kind: int  # place in KINDS
    mix: float
    shares: tuple[float, float]  # of teacher and student in the mixture

    @staticmethod
    def of(divergence: str, mix: float | None, device: torch.device, precision: torch.dtype) -> Kernel | None:
        """None where the visit must go torch's way: on other devices, in float64, for `uld`, without Triton."""
        if not _runs_on(device) or precision != torch.float32 or divergence not in KINDS:
            return None
        if mix is None:
            mix = JENSEN_SHANNON_MIX if divergence == "jensen_shannon" else SKEW
        shares = (mix, 1 - mix) if divergence == "skew_forward_kl" else (1 - mix, mix)
        return Kernel(KINDS.index(divergence), mix, shares)

    def __call__(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        text_weight: Tensor,
        divergence_weight: Tensor,
        text: Tensor,
        value: Tensor,
        common: int,
        temperature: float,
        texted: bool,
    ) -> None:
        """Replaces logits, [n, vocab], by the gradient of the loss, and writes the terms of each row.

        Args:
            teacher: its logits of the ids compared, [n, common]; None where no row has a divergence weight.
            labels: [n], 0 where there is no target. text_weight, divergence_weight: [n] fp32.
            text, value: [n] fp32, written. texted: whether any row has a text weight.
        """
        programs: Any = importlib.import_module("distilvlm.losses.programs")  # which needs Triton

        rows, vocabulary = logits.shape
        compared = teacher is not None
        known = {"TEXT": texted, "COMPARED": compared, "SAME": compared and common == vocabulary and temperature == 1}
        other, other_stride = (teacher, teacher.stride(0)) if teacher is not None else (logits, 0)
        part = -(-vocabulary // (PARTS * BLOCK)) * BLOCK  # ids of one
        partial, sloped = logits.new_empty(9, rows, PARTS, dtype=torch.float32).split([7, 2])
        of_rows = logits.stride(0), other_stride, rows * PARTS
        scale, mixture = 1 / temperature, (self.mix, *map(math.log, self.shares))
        compiled = {"PARTS": PARTS, "BLOCK": BLOCK, "num_warps": WARPS}
        programs.sums[(rows, PARTS)](
            logits, other, partial, *of_rows, vocabulary, common, scale, part, **known, **compiled
        )
        if compared and self.kind:
            programs.slopes[(rows, PARTS)](
                logits, other, partial, sloped, *of_rows, common, scale, part, *mixture, KIND=self.kind, **compiled
            )
        given = labels, text_weight, divergence_weight, text, value
        programs.gradients[(rows, -(-vocabulary // BLOCK))](
            logits, other, partial, sloped, *given, *of_rows, vocabulary, common, scale, *mixture,
            KIND=self.kind, **known, **compiled,
        )  # fmt: skip


@functools.cache
def _runs_on(device: torch.device) -> bool:
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    # Triton's own interpreter runs a kernel without a device, slowly: how tests see it where there is none.
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
