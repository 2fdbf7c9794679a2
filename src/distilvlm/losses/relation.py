"""The relation loss of LLaVA-KD, without ever holding logits of the visual rows.

With Z = H Wᵀ the raw logits of one sample's visual rows, its relation matrix is R = Z Zᵀ and the loss is one minus the
cosine of student's and teacher's whole matrices. Since Z Zᵀ = H (WᵀW) Hᵀ, a frozen head is needed only once, for its
Gram matrix G = WᵀW. Source: LLaVA-KD `compute_loss` (raw logits, no softmax, centring or scaling; one cosine over the
flattened matrix, eps 1e-8); specification §2.1 item 4 and §6.3.

All products here are in fp32 (float64 for float64 inputs), also under autocast: R sums over the whole vocabulary.
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cosine_similarity

BLOCK_ELEMENTS = 2**24
"""Elements of a vocabulary block that is cast or projected at a time; memory does not grow with the vocabulary."""

GRAM_COLUMNS = 4
"""Column blocks of a Gram matrix. Only the upper ones are multiplied, the rest is mirrored: 5/8 of the products."""


def gram(head: Tensor) -> Tensor:
    """G = WᵀW of a head, [vocab, d] → [d, d] fp32; differentiable.

    Build it once per stage for a frozen head. Where student's and teacher's vocabularies differ in padding, it must be
    the Gram matrix of the common ids only: `gram(head[:common])`.
    """
    if torch.is_grad_enabled() and head.requires_grad:
        return _Gram.apply(head)  # pyright: ignore[reportReturnType]
    return build_gram(head.detach())


def relation(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    student_gram: Tensor | None = None,
    teacher_gram: Tensor | None = None,
) -> Tensor:
    """1 − cos(R_T, R_S) of one sample's visual rows: a scalar in [0, 2], fp32; 0 for no rows at all.

    `*_hidden` are final-normed hidden states [visual, d], `*_head` head weights [vocab, d]. A Gram matrix that is given
    stands for its head. Heads of different length are cut to the common ids; a given Gram matrix must be of those ids.

    Raises `ValueError` when the numbers of visual rows differ.
    """
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"relation compares the same visual rows of both models, but the student has {student_hidden.shape[0]} and "
            f"the teacher {teacher_hidden.shape[0]}: give both the rows of one Batch.visual_rows"
        )
    common = min(student_head.shape[0], teacher_head.shape[0])
    student = relation_matrix(student_hidden, student_head, common, student_gram)
    with torch.no_grad():
        teacher = relation_matrix(teacher_hidden, teacher_head, common, teacher_gram)
    return relation_distance(student, teacher)


def relation_matrix(hidden: Tensor, head: Tensor, common: int, gram: Tensor | None = None) -> Tensor:
    """R = (H Wᵀ)(H Wᵀ)ᵀ over the first `common` ids, [visual, visual]; differentiable in hidden, head and gram."""
    with torch.autocast(hidden.device.type, enabled=False):
        if gram is None:
            return _RelationMatrix.apply(hidden, head, common)  # pyright: ignore[reportReturnType]
        hidden = hidden.to(gram.dtype)
        return hidden @ gram @ hidden.T


def relation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine of two relation matrices; 0, still connected, when they are empty."""
    if student.numel() == 0:
        return student.sum()
    return 1 - cosine_similarity(student.flatten(), teacher.flatten().to(student.dtype), dim=0, eps=1e-8)


def build_gram(head: Tensor) -> Tensor:
    """WᵀW without autograd. Vocabulary blocks keep a bf16 head from being cast whole."""
    precision = accumulation(head)
    width = head.shape[1]
    result = torch.zeros(width, width, dtype=precision, device=head.device)
    columns = -(-width // GRAM_COLUMNS)
    for block in vocabulary_blocks(head):
        block = block.to(precision)
        for left in range(0, width, columns):
            right = left + columns
            result[left:right, left:].addmm_(block[:, left:right].T, block[:, left:])
    return torch.triu(result) + torch.triu(result, 1).T


def pull_back(gradient: Tensor, hidden: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """From ∂L/∂R of R = P Hᵀ, P = H WᵀW, to ∂L/∂H and the S of ∂L/∂W = W S.

    With D = ∂L/∂R + its transpose: ∂L/∂H = D P and S = Hᵀ D H (specification §6.3).
    """
    symmetric = gradient + gradient.T
    return symmetric @ projected, hidden.T @ symmetric @ hidden


def add_product(target: Tensor, head: Tensor, factor: Tensor, dtype: torch.dtype) -> None:
    """target += W S in blocks, with products in `dtype`; [vocab, d] += [vocab, d] · [d, d]."""
    factor = factor.to(dtype)
    for into, block in zip(vocabulary_blocks(target), vocabulary_blocks(head), strict=True):
        if into.dtype == dtype:
            into.addmm_(block.to(dtype), factor)
        else:
            into.add_(block.to(dtype) @ factor)


def shares_logits(rows: int, head: Tensor) -> bool:
    """Whether H WᵀW of `rows` rows is cheaper from logits H Wᵀ that another term has built anyway than from WᵀW.

    Per id of the vocabulary the former costs rows·d multiplications in the head's dtype, the latter 5/8·d² in fp32,
    which matrix units multiply several times slower than bf16.
    """
    fp32_cost = 1 if head.dtype in (torch.float32, torch.float64) else 4
    return 8 * rows <= 5 * head.shape[1] * fp32_cost


def vocabulary_blocks(head: Tensor) -> tuple[Tensor, ...]:
    """Views of a [vocab, d] matrix, of at most BLOCK_ELEMENTS elements each."""
    return head.split(max(1, BLOCK_ELEMENTS // head.shape[1]))


def accumulation(*tensors: Tensor) -> torch.dtype:
    """fp32 for anything shorter, float64 as soon as one tensor is float64."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class _Gram(torch.autograd.Function):
    """WᵀW with its gradient W (∂G + ∂Gᵀ)."""

    @staticmethod
    def forward(ctx: Any, head: Tensor) -> Tensor:
        ctx.save_for_backward(head)
        return build_gram(head)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> Tensor:
        (head,) = ctx.saved_tensors
        (gradient,) = gradients
        result = torch.zeros_like(head, dtype=gradient.dtype)
        with torch.autocast(head.device.type, enabled=False):
            add_product(result, head, gradient + gradient.T, gradient.dtype)
        return result


class _RelationMatrix(torch.autograd.Function):
    """R = P Hᵀ with P = H WᵀW, by whichever order of the three factors costs less."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, common: int) -> Tensor:
        precision = accumulation(hidden, head)
        rows = hidden.to(precision)
        used = head[:common]
        # Per id of the vocabulary, 2·rows·d multiplications through logits against 5/8·d² through a Gram matrix.
        if 2 * 8 * rows.shape[0] > 5 * head.shape[1]:
            projected = rows @ build_gram(used).to(precision)
        else:
            projected = torch.zeros_like(rows)
            for block in vocabulary_blocks(used):
                block = block.to(precision)
                projected.addmm_(rows @ block.T, block)
        ctx.save_for_backward(rows, projected, head)
        ctx.common = common
        return projected @ rows.T

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        rows, projected, head = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            grad_rows, factor = pull_back(gradients[0], rows, projected)
            grad_head = None
            if ctx.needs_input_grad[1]:
                grad_head = torch.zeros_like(head, dtype=rows.dtype)
                add_product(grad_head[: ctx.common], head[: ctx.common], factor, rows.dtype)
        return grad_rows, grad_head, None
