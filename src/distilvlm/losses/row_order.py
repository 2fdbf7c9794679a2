"""Which rows of a call cost something, and in which order they are worked through."""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""Label of a row without a text target (the convention of torch's and transformers' cross-entropy)."""


@dataclass(frozen=True)
class OrderedRows:
    """The rows that cost something, in an order that keeps whatever is done to them contiguous:

    relation rows without divergence, relation rows with it, other rows with it, rows with a divergence from what is
    known of sparse targets, rows with text only.
    """

    order: Tensor  # [used] indices into the caller's rows
    related: int  # rows [0, related) are in a relation
    compared_from: int  # rows [compared_from, compared_to) have a divergence weight
    compared_to: int
    sparse_to: int  # rows [compared_to, sparse_to) have one, too, and sparse targets
    labels: Tensor  # [used], 0 where there is no target
    text_weight: Tensor  # [used], 0 where there is no target
    divergence_weight: Tensor  # [used]
    texted: list[bool]  # [used], on the host: which rows have a text weight
    samples: tuple[Tensor, ...]  # per sample, positions of its relation rows in this order

    @property
    def used(self) -> int:
        return len(self.texted)

    @property
    def compared(self) -> int:
        return self.compared_to - self.compared_from

    @staticmethod
    def of(
        labels: Tensor,
        text_weight: Tensor,
        divergence_weight: Tensor,
        relation_rows: Sequence[Tensor],
        dtype: torch.dtype,
        sparse_rows: Tensor | None = None,
    ) -> OrderedRows:
        """`sparse_rows`: those with sparse targets. Raises `ValueError` where one of them is in a relation, too."""
        text_weight = text_weight.to(dtype).masked_fill(labels == IGNORED, 0)
        divergence_weight = divergence_weight.to(dtype)
        related = torch.zeros_like(labels, dtype=torch.bool)
        for sample in relation_rows:
            related[sample] = True
        compared = divergence_weight != 0
        kind = torch.full_like(labels, 5)
        kind[text_weight != 0] = 4
        kind[compared] = 2
        if sparse_rows is not None:
            kind[sparse_rows] += compared[sparse_rows].to(kind.dtype)
            if relation_rows and bool((related[sparse_rows] & compared[sparse_rows]).any()):
                raise ValueError("a row with sparse targets can't be in a relation, too: give it twice")
        kind[related] = compared[related].to(kind.dtype)
        counts: list[int] = torch.bincount(kind, minlength=6).tolist()
        order = torch.argsort(kind, stable=True)[: sum(counts[:5])]
        place = torch.empty_like(labels)
        place[order] = torch.arange(order.numel(), device=order.device)
        text_weight = text_weight[order]
        return OrderedRows(
            order=order,
            related=counts[0] + counts[1],
            compared_from=counts[0],
            compared_to=sum(counts[:3]),
            sparse_to=sum(counts[:4]),
            labels=labels[order].masked_fill(text_weight == 0, 0),
            text_weight=text_weight,
            divergence_weight=divergence_weight[order],
            texted=(text_weight != 0).tolist(),
            samples=tuple(place[sample] for sample in relation_rows),
        )
