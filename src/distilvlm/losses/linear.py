"""Cross-entropy and divergence of two language-model heads, from hidden states and head weights.

Logits exist only for a few rows at a time: a chunk of rows goes through both heads, loss and gradient with respect to
its logits are formed in one visit, and the gradient is at once multiplied into those of the hidden states and of the
head. Nothing of size [rows, vocab] is kept, and the memory of a chunk does not depend on the vocabulary.

For row t with weights a (text) and k (divergence), p = softmax(z), temperature 1 and forward KL (specification §6.2):

    loss_t   = a (−log p_S[y]) + k Σ_v p_T (log p_T − log p_S)
    ∂/∂z_S   = a (p_S − e_y)   + k (p_S − p_T)
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilvlm.losses.divergences import Divergence, chosen, compared_ids
from distilvlm.losses.kernels import Kernel
from distilvlm.losses.relation import (
    accumulation,
    add_product,
    build_gram,
    pull_back,
    shares_logits,
    vocabulary_blocks,
)
from distilvlm.losses.row_order import OrderedRows
from distilvlm.losses.sparse import Events, Sparse, require_comparable

CHUNK_ELEMENTS = 12 * 2**20
"""Logits of one chunk, rows × vocab, for each of the two models: 48 MiB in fp32. Two-byte logits get twice as many."""

CHUNK_ROWS = 128
"""Rows of a chunk where the vocabulary is small enough for more: they would cost memory and gain no speed. Twice as
many for two-byte logits."""

CUDA_ROWS = 512
"""Rows of a chunk on a GPU, whatever the vocabulary: with fewer its matrix units wait for the head's weights, and a
number of rows that is no multiple of 128 leaves part of them idle."""

TILE_ELEMENTS = 2**18
"""Logits that each thread of a CPU visits together. The dozen elementwise passes of a tile stay in the caches instead
of going through memory each; with the whole chunk as one tile they take about five times as long. Smaller tiles make
the threads wait for each other more often. Other devices take the chunk whole."""


_ADDS_TO_OTHER_DTYPES = torch.version.cuda is not None and "dtype_out" in torch.ops.aten.addmm.overloads()
"""Whether this torch (2.8 or later, on CUDA) has a product whose sum is of another dtype than its factors."""


@dataclass(frozen=True)
class Distillation:
    """What `linear_distillation` gives."""

    loss: Tensor  # scalar with gradient: Σ text_weight · text + divergence_weight · divergence
    text: Tensor  # [rows] detached, nats; 0 where the row has no target or no text weight
    divergence: Tensor  # [rows] detached, nats; 0 where the row has no divergence weight
    relations: tuple[Tensor, ...] = ()  # [visual, visual] each, with gradient


def linear_distillation(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    text_weight: Tensor,
    divergence_weight: Tensor,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    chunk_elements: int | None = None,
    relation_rows: Sequence[Tensor] = (),
    sparse: Sparse | None = None,
    sparse_rows: Tensor | None = None,
    teacher_ids: int | None = None,
    mix: float | None = None,
) -> Distillation:
    """Weighted cross-entropy and divergence of rows, with exact gradients for the student's hidden states and head.

    student_hidden: [rows, d_student] final-normed hidden states; student_head: [vocab, d_student], no bias.
    teacher_hidden, teacher_head: the same of the teacher, [rows, d_teacher] and [vocab_teacher, d_teacher]; they never
        receive a gradient, and may be None when every divergence weight is 0.
    labels: [rows] int64, the id that the row predicts (already shifted), −100 for no text target.
    text_weight, divergence_weight: [rows]; a row with neither costs nothing.
    divergence: a key of `divergences.DIVERGENCES`; temperature divides both logits, there is no τ² factor.
    chunk_elements: logits of each model held at a time, counted as fp32; does not change the result.
    relation_rows: index tensors into the rows, one per sample. For each, the relation matrix Z Zᵀ of its student logits
        comes back in `.relations`; it shares the logits and the head's gradient buffer with the other terms, which is
        how a head that trains gets its relation loss (see relation.py for a frozen one).
    sparse, sparse_rows: what is known of the teacher's distributions of some rows, and which these are, each once:
        their divergence is from this, not from the teacher's hidden states there, and they are in no relation.
    teacher_ids: length of the teacher's vocabulary where there is no head to tell it; None: at least the student's.
    mix: λ of a divergence from a mixture; None: the default of `divergences.py`.

    Vocabularies of different length: divergence and relations use the common ids ("uld": all), the text term the
    student's whole vocabulary. Products run in the dtype of the head, or in autocast's; everything else, and the head's
    gradient, in fp32 (float64 where an input is float64). `.text` and `.divergence` are values per row, before weights.

    Raises `ValueError` for an unknown divergence, a mix of what mixes nothing, a temperature that is not positive, rows
    that do not match, a divergence weight without a teacher, sparse targets with a divergence or temperature that can't
    be right for them (`sparse.require_comparable`), or fp16. Gradients cannot be differentiated again.
    """
    compare = chosen(divergence, mix)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    lengths = {"labels": labels, "text_weight": text_weight, "divergence_weight": divergence_weight}
    if teacher_hidden is not None:
        lengths["teacher_hidden"] = teacher_hidden
    for name, tensor in lengths.items():
        if tensor.shape[0] != student_hidden.shape[0]:
            raise ValueError(f"{name} has {tensor.shape[0]} rows, student_hidden {student_hidden.shape[0]}")
    if sparse is not None:
        require_comparable(sparse, divergence, temperature)
        if sparse_rows is None or sparse_rows.shape[0] != sparse.ids.shape[0]:
            found = 0 if sparse_rows is None else sparse_rows.shape[0]
            raise ValueError(f"sparse_rows names {found} rows, and sparse targets are of {sparse.ids.shape[0]}")

    with torch.no_grad():
        precision = accumulation(student_hidden, student_head)
        rows = OrderedRows.of(
            labels,
            text_weight,
            divergence_weight,
            relation_rows,
            precision,
            sparse_rows=None if sparse is None else sparse_rows,
        )
        if rows.compared and (teacher_hidden is None or teacher_head is None):
            raise ValueError(
                f"{rows.compared} rows have a divergence weight, but there is no teacher: give teacher_hidden and "
                "teacher_head, or weights of 0"
            )
        ids = teacher_ids or student_head.shape[0] if teacher_head is None else teacher_head.shape[0]
        common, teachers = compared_ids(divergence, student_head.shape[0], ids)
        events: Events | None = None
        if sparse is not None and sparse_rows is not None:
            place = torch.empty_like(labels)
            place[sparse_rows] = torch.arange(sparse_rows.numel(), device=labels.device)
            events = Events.of(sparse, common, precision)[place[rows.order[rows.compared_to : rows.sparse_to]]]
    work = _Work(
        rows=rows,
        teacher_hidden=None if teacher_hidden is None else teacher_hidden.detach(),
        teacher_head=None if teacher_head is None else teacher_head.detach(),
        common=common,
        teachers=teachers,
        events=events,
        divergence=compare,
        kernel=Kernel.of(divergence, mix, student_hidden.device, precision),
        temperature=temperature,
        chunk_elements=chunk_elements,
        student_product=_product_dtype(student_head),
        teacher_product=_product_dtype(student_head if teacher_head is None else teacher_head),
        gradient=torch.is_grad_enabled(),
    )
    loss, text, value, *relations = _LinearDistillation.apply(student_hidden, student_head, work)  # pyright: ignore
    return Distillation(loss, text, value, tuple(relations))


def _product_dtype(head: Tensor) -> torch.dtype:
    """The dtype that `linear` would multiply this head in: autocast's where that is on, else its own."""
    device, dtype = head.device.type, head.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        # The gradient of a logit is formed before any loss scaling, and weight · p of one id of a large vocabulary is
        # below fp16's smallest number.
        raise ValueError("the loss head cannot work in fp16, where its gradients vanish: use bf16 or fp32")
    return dtype


@dataclass(frozen=True)
class _Work:
    """Everything about a call that is not differentiated."""

    rows: OrderedRows
    teacher_hidden: Tensor | None  # [rows, d_teacher]
    teacher_head: Tensor | None  # [vocab_teacher, d_teacher]
    common: int  # ids of the student's that are compared: those that both vocabularies have, or all
    teachers: int  # ids of the teacher's that are compared
    events: Events | None  # of the ordered rows that have sparse targets
    divergence: Divergence
    kernel: Kernel | None
    temperature: float
    chunk_elements: int | None  # None: what suits the device
    student_product: torch.dtype
    teacher_product: torch.dtype
    gradient: bool  # False under torch.no_grad

    def visit(self, logits: Tensor, teacher_logits: Tensor | None, start: int, text: Tensor, value: Tensor) -> None:
        """Replaces the logits of the ordered rows [start, start + n) by the gradient of the loss.

        logits: [n, vocab]; teacher_logits: [n, teachers], or None where no row has a divergence weight, or all of them
        have sparse targets. Writes the terms of each row into `text` and `value`, [n]. Reductions are in the weights'
        precision, not in the logits'.
        """
        rows, stop = self.rows, start + logits.shape[0]
        precision, texted = rows.text_weight.dtype, any(rows.texted[start:stop])
        known = self._known(start, stop)
        if self.kernel is not None and known is None and (texted or teacher_logits is not None):
            at = slice(start, stop)
            weights = rows.text_weight[at], rows.divergence_weight[at]
            self.kernel(
                logits, teacher_logits, rows.labels[at], *weights, text, value, self.common, self.temperature, texted
            )
            return
        gradient: Tensor | None = None  # [n, vocab]
        if texted:
            weight = rows.text_weight[start:stop].unsqueeze(1)  # [n, 1]
            labels = rows.labels[start:stop].unsqueeze(1)
            gradient = torch.log_softmax(logits, -1, dtype=precision)
            text.copy_(gradient.gather(1, labels).neg_().masked_fill_(weight == 0, 0).squeeze(1))
            gradient.exp_().scatter_add_(1, labels, torch.full_like(weight, -1)).mul_(weight)
        if teacher_logits is not None or known is not None:
            student = self._log_probabilities(logits[:, : self.common], precision)
            if teacher_logits is not None:
                divergence, towards_teacher = self.divergence(
                    student, self._log_probabilities(teacher_logits, precision)
                )
            else:
                assert known is not None
                divergence, towards_teacher = known.compare(student, self.divergence)
            value.copy_(divergence)
            weight = rows.divergence_weight[start:stop].unsqueeze(1) / self.temperature
            if gradient is None:
                torch.mul(towards_teacher, weight, out=logits[:, : self.common])
                logits[:, self.common :].zero_()
                return
            gradient[:, : self.common].addcmul_(towards_teacher, weight)
        if gradient is None:
            logits.zero_()
        else:
            logits.copy_(gradient)

    def _known(self, start: int, stop: int) -> Events | None:
        """Of the ordered rows [start, stop), which have sparse targets or have none, all of them."""
        first = self.rows.compared_to
        if self.events is None or not first <= start < self.rows.sparse_to:
            return None
        return self.events[start - first : stop - first]

    def _log_probabilities(self, logits: Tensor, precision: torch.dtype) -> Tensor:
        if self.temperature != 1:
            logits = logits.to(precision) / self.temperature
        return torch.log_softmax(logits, -1, dtype=precision)


class _LinearDistillation(torch.autograd.Function):
    """Forms the gradient during the forward pass, so that no logits are kept for the backward one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, work: _Work) -> tuple[Tensor, ...]:
        rows, precision = work.rows, work.rows.text_weight.dtype
        ctx.work = work
        ctx.set_materialize_grads(False)
        grad_hidden = grad_head = None
        if work.gradient and ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros_like(hidden, dtype=precision)
        if work.gradient and ctx.needs_input_grad[1]:
            grad_head = torch.zeros_like(head, dtype=precision)
        with torch.autocast(hidden.device.type, enabled=False):
            text, value, related, projected = _sweep(hidden, head, work, grad_hidden, grad_head)
            relations = [projected[sample] @ related[sample].T for sample in rows.samples]
            loss = text @ rows.text_weight + value @ rows.divergence_weight
        ctx.save_for_backward(head, related, projected, grad_hidden, grad_head)
        per_row = [torch.zeros_like(hidden[:, 0], dtype=precision).index_copy_(0, rows.order, x) for x in (text, value)]
        ctx.mark_non_differentiable(*per_row)
        return loss, *per_row, *relations

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        head, related, projected, grad_hidden, grad_head = ctx.saved_tensors
        work: _Work = ctx.work
        # In place: a second buffer of the head's size would double what a head that trains costs.
        for gradient in (grad_hidden, grad_head):
            if gradient is not None:
                gradient.mul_(0 if gradients[0] is None else gradients[0])
        with torch.autocast(related.device.type, enabled=False):
            factor: Tensor | None = None
            for sample, gradient in zip(work.rows.samples, gradients[3:], strict=True):
                if gradient is None:
                    continue
                grad_rows, part = pull_back(gradient, related[sample], projected[sample])
                factor = part if factor is None else factor.add_(part)
                if grad_hidden is not None:
                    grad_hidden.index_add_(0, work.rows.order[sample], grad_rows)
            if grad_head is not None and factor is not None:
                add_product(grad_head[: work.common], head[: work.common], factor, work.student_product)
        return grad_hidden, grad_head, None


def _sweep(
    hidden: Tensor, head: Tensor, work: _Work, grad_hidden: Tensor | None, grad_head: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over chunks of rows; adds to the two gradients.

    Returns text and divergence of the ordered rows, [used] each; and of the relation rows H and P = H WᵀW,
    [related, d_student] each.
    """
    rows, common, precision = work.rows, work.common, work.rows.text_weight.dtype
    text, value = torch.zeros_like(rows.text_weight), torch.zeros_like(rows.text_weight)
    head = head.to(work.student_product)
    student_rows = hidden[rows.order].to(work.student_product)
    related = student_rows[: rows.related].to(precision)
    shares = shares_logits(rows.related, head)
    projected = torch.empty_like(related) if shares else related @ build_gram(head[:common]).to(precision)

    size = max(1, min(_chunk_rows(work, head), rows.used))
    logits = head.new_empty(size, head.shape[0])
    teacher = _TeacherLogits.of(work, size)
    for start in range(0, rows.used, size):
        stop = min(start + size, rows.used)
        chunk = torch.mm(student_rows[start:stop], head.T, out=logits[: stop - start])
        if shares and start < rows.related:
            end = min(stop, rows.related)
            projected[start:end] = chunk[: end - start, :common] @ head[:common]
        edges = rows.compared_from, rows.compared_to, rows.sparse_to
        first, last, end = (min(max(edge, start), stop) for edge in edges)
        if first == end and not any(rows.texted[start:stop]):
            continue  # here for their relation only
        teacher_logits = teacher(first, last) if teacher is not None and first < last else None
        pieces = (start, first), (first, last), (last, end), (end, stop)
        for tile in (tile for piece in pieces for tile in _tiles(*piece, chunk)):
            other: Tensor | None = None
            if teacher_logits is not None and first <= tile.start < last:
                other = teacher_logits[tile.start - first : tile.stop - first]
            work.visit(chunk[tile.start - start : tile.stop - start], other, tile.start, text[tile], value[tile])
        if grad_hidden is not None:
            grad_hidden.index_copy_(0, rows.order[start:stop], (chunk @ head).to(precision))
        if grad_head is not None:
            _add_outer(grad_head, chunk, student_rows[start:stop])
    return text, value, related, projected


def _chunk_rows(work: _Work, head: Tensor) -> int:
    if work.chunk_elements is None and head.device.type == "cuda":
        return CUDA_ROWS
    rows = (work.chunk_elements or CHUNK_ELEMENTS) // max(head.shape[0], work.teachers)
    return min(rows, CHUNK_ROWS) * 4 // head.element_size()


@dataclass(frozen=True)
class _TeacherLogits:
    """The teacher's logits of ordered rows, over the ids compared, in one buffer that the next call overwrites."""

    hidden: Tensor  # [compared, d_teacher]
    head: Tensor  # [teachers, d_teacher]
    buffer: Tensor  # [chunk, teachers]
    compared_from: int

    @staticmethod
    def of(work: _Work, size: int) -> _TeacherLogits | None:
        rows = work.rows
        if work.teacher_hidden is None or work.teacher_head is None or not rows.compared:
            return None
        hidden = work.teacher_hidden[rows.order[rows.compared_from : rows.compared_to]].to(work.teacher_product)
        head = work.teacher_head[: work.teachers].to(work.teacher_product)
        return _TeacherLogits(hidden, head, head.new_empty(min(size, rows.compared), work.teachers), rows.compared_from)

    def __call__(self, first: int, last: int) -> Tensor:
        rows = self.hidden[first - self.compared_from : last - self.compared_from]
        return torch.mm(rows, self.head.T, out=self.buffer[: last - first])


def _tiles(start: int, stop: int, chunk: Tensor) -> list[slice]:
    size = max(1, chunk.shape[0])
    if chunk.device.type == "cpu":
        # torch's softmax hands whole rows to threads, so a tile has at least one for each.
        size = torch.get_num_threads() * max(1, TILE_ELEMENTS // chunk.shape[1])
    return [slice(left, min(left + size, stop)) for left in range(start, stop, size)]


def _add_outer(target: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """target += gradientᵀ · hidden; [vocab, d] += [rows, vocab]ᵀ · [rows, d].

    In blocks where the product's dtype is not the target's, so that its copy does not grow with the vocabulary; a GPU
    adds to another dtype as it multiplies.
    """
    if target.dtype == gradient.dtype:
        target.addmm_(gradient.T, hidden)
        return
    if target.is_cuda and _ADDS_TO_OTHER_DTYPES:
        torch.addmm(target, gradient.T, hidden, out_dtype=target.dtype, out=target)  # pyright: ignore[reportCallIssue]
        return
    blocks = vocabulary_blocks(target)
    for into, block in zip(blocks, gradient.split(blocks[0].shape[0], dim=1), strict=True):
        into.add_(block.T @ hidden)
