"""What a GPU runs for rows of logits. Needs Triton when it is imported; `kernels.py` is the way in.

A row is worked on by many programs at once, since there are fewer rows in a chunk than a GPU has room for: `sums` of
parts of the row, which whoever comes next adds up (`partition`); for all but forward KL `slopes` of parts; then
`gradients`, each block of ids by itself. Numbers are fp32, whatever the logits are.
"""

# Triton's language is not Python to a type checker.
# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# ruff: noqa: N803 - what is known when a program is compiled is written in capitals

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sums(
    logits,  # [n, vocab]
    teacher,  # [n, common]
    partial,  # [7, n, PARTS], written
    stride,
    teacher_stride,
    size,  # n * PARTS
    vocabulary,
    common,
    scale,  # 1 / temperature
    part,  # ids of a part
    TEXT: tl.constexpr,  # whether a row has a text weight
    COMPARED: tl.constexpr,  # whether there is a teacher
    SAME: tl.constexpr,  # whether text and divergence have one partition function
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a part of a row: highest logit and Σ exp above it, of the student's, the teacher's and the text term's; and
    Σ p_T (z_T − z_S) up to the teacher's partition function."""
    number = tl.program_id(0)
    which = tl.program_id(1)
    row = logits + number.to(tl.int64) * stride
    other = teacher + number.to(tl.int64) * teacher_stride
    place = partial + number * PARTS + which
    lanes = tl.arange(0, BLOCK)
    first = which * part
    if COMPARED:
        highest = -1.0e30
        highest_teacher = -1.0e30
        total = tl.zeros([BLOCK], tl.float32)
        total_teacher = tl.zeros([BLOCK], tl.float32)
        apart = tl.zeros([BLOCK], tl.float32)
        for start in range(first, tl.minimum(first + part, common), BLOCK):
            inside = start + lanes < common
            z = tl.load(row + start + lanes, inside, -float("inf")).to(tl.float32) * scale
            y = tl.load(other + start + lanes, inside, -float("inf")).to(tl.float32) * scale
            higher = tl.maximum(highest, tl.max(z, 0))
            total = total * tl.exp(highest - higher) + tl.exp(z - higher)
            highest = higher
            higher = tl.maximum(highest_teacher, tl.max(y, 0))
            shrunk = tl.exp(highest_teacher - higher)
            share = tl.exp(y - higher)
            total_teacher = total_teacher * shrunk + share
            apart = apart * shrunk + tl.where(inside, share * (y - z), 0.0)
            highest_teacher = higher
        tl.store(place, highest)
        tl.store(place + size, tl.sum(total, 0))
        tl.store(place + 2 * size, highest_teacher)
        tl.store(place + 3 * size, tl.sum(total_teacher, 0))
        tl.store(place + 4 * size, tl.sum(apart, 0))
    if TEXT and not SAME:
        highest_text = -1.0e30
        total_text = tl.zeros([BLOCK], tl.float32)
        for start in range(first, tl.minimum(first + part, vocabulary), BLOCK):
            z = tl.load(row + start + lanes, start + lanes < vocabulary, -float("inf")).to(tl.float32)
            higher = tl.maximum(highest_text, tl.max(z, 0))
            total_text = total_text * tl.exp(highest_text - higher) + tl.exp(z - higher)
            highest_text = higher
        tl.store(place + 5 * size, highest_text)
        tl.store(place + 6 * size, tl.sum(total_text, 0))


@triton.jit
def partition(place, size, PARTS: tl.constexpr):
    """Highest logit of a row and Σ exp above it, from those of its parts."""
    parts = tl.arange(0, PARTS)
    highest = tl.load(place + parts)
    top = tl.max(highest, 0)
    return top, tl.sum(tl.load(place + size + parts) * tl.exp(highest - top), 0)


@triton.jit
def slope(log_student, log_teacher, mix, log_first, log_second, KIND: tl.constexpr):
    """Of one id: what it adds to the divergence, and the divergence's derivative by p_S up to a constant.

    The mixture has the teacher's share exp(log_first) and the student's exp(log_second).
    """
    student = tl.exp(log_student)
    if KIND == 1:  # reverse KL
        by_student = log_student - log_teacher
        value = student * by_student
    else:
        first = log_teacher + log_first
        second = log_student + log_second
        log_middle = tl.maximum(first, second) + tl.log(1 + tl.exp(-tl.abs(first - second)))
        if KIND == 2:  # Jensen-Shannon
            by_student = mix * (log_student - log_middle)
            value = student * by_student + (1 - mix) * tl.exp(log_teacher) * (log_teacher - log_middle)
        elif KIND == 3:  # skewed forward KL
            by_student = (mix - 1) * tl.exp(log_teacher - log_middle)
            value = tl.exp(log_teacher) * (log_teacher - log_middle)
        else:  # skewed reverse KL
            by_student = log_student - log_middle
            value = student * by_student
            by_student -= mix * tl.exp(log_student - log_middle)
    return value, by_student, student


@triton.jit
def slopes(
    logits,
    teacher,
    partial,
    sloped,  # [2, n, PARTS], written
    stride,
    teacher_stride,
    size,
    common,
    scale,
    part,
    mix,
    log_first,
    log_second,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a part of a row: its share of the divergence, and of ⟨p_S, f′⟩."""
    number = tl.program_id(0)
    which = tl.program_id(1)
    row = logits + number.to(tl.int64) * stride
    other = teacher + number.to(tl.int64) * teacher_stride
    top, total = partition(partial + number * PARTS, size, PARTS)
    top_teacher, total_teacher = partition(partial + 2 * size + number * PARTS, size, PARTS)
    log_student = top + tl.log(total)
    log_teacher = top_teacher + tl.log(total_teacher)
    lanes = tl.arange(0, BLOCK)
    values = tl.zeros([BLOCK], tl.float32)
    constants = tl.zeros([BLOCK], tl.float32)
    first = which * part
    for start in range(first, tl.minimum(first + part, common), BLOCK):
        inside = start + lanes < common
        z = tl.load(row + start + lanes, inside, 0).to(tl.float32) * scale - log_student
        y = tl.load(other + start + lanes, inside, 0).to(tl.float32) * scale - log_teacher
        value, by_student, student = slope(z, y, mix, log_first, log_second, KIND)
        values += tl.where(inside, value, 0.0)
        constants += tl.where(inside, student * by_student, 0.0)
    tl.store(sloped + number * PARTS + which, tl.sum(values, 0))
    tl.store(sloped + size + number * PARTS + which, tl.sum(constants, 0))


@triton.jit
def gradients(
    logits,  # overwritten by the gradient
    teacher,
    partial,
    sloped,
    labels,
    text_weight,
    divergence_weight,
    text,  # [n], written
    value,  # [n], written
    stride,
    teacher_stride,
    size,
    vocabulary,
    common,
    scale,
    mix,
    log_first,
    log_second,
    KIND: tl.constexpr,
    TEXT: tl.constexpr,
    COMPARED: tl.constexpr,
    SAME: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a block of a row's ids."""
    number = tl.program_id(0)
    which = tl.program_id(1)
    row = logits + number.to(tl.int64) * stride
    other = teacher + number.to(tl.int64) * teacher_stride
    mine = number * PARTS
    parts = tl.arange(0, PARTS)
    at = which * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(row + at, at < vocabulary, 0).to(tl.float32)
    gradient = tl.zeros([BLOCK], tl.float32)
    log_student = 0.0
    if COMPARED:
        inside = at < common
        top, total = partition(partial + mine, size, PARTS)
        top_teacher, total_teacher = partition(partial + 2 * size + mine, size, PARTS)
        log_student = top + tl.log(total)
        log_teacher = top_teacher + tl.log(total_teacher)
        weight = tl.load(divergence_weight + number) * scale
        z = raw * scale - log_student
        y = tl.load(other + at, inside, 0).to(tl.float32) * scale - log_teacher
        if KIND == 0:
            student = tl.exp(z)
            gradient = weight * (student - tl.exp(y))
            highest = tl.load(partial + 2 * size + mine + parts)
            apart = tl.sum(tl.load(partial + 4 * size + mine + parts) * tl.exp(highest - top_teacher), 0)
            found = apart / total_teacher + log_student - log_teacher
        else:
            _, by_student, student = slope(z, y, mix, log_first, log_second, KIND)
            constant = tl.sum(tl.load(sloped + size + mine + parts), 0)
            gradient = weight * student * (by_student - constant)
            found = tl.sum(tl.load(sloped + mine + parts), 0)
        gradient = tl.where(inside, gradient, 0.0)
        if which == 0:
            tl.store(value + number, found)
    if TEXT:
        label = tl.load(labels + number)
        share = tl.load(text_weight + number)
        log_text = log_student
        if SAME:
            likely = student
        else:
            top_text, total_text = partition(partial + 5 * size + mine, size, PARTS)
            log_text = top_text + tl.log(total_text)
            likely = tl.exp(raw - log_text)
        gradient += share * (likely - tl.where(at == label, 1.0, 0.0))
        if which == label // BLOCK:
            likelihood = tl.sum(tl.where(at == label, raw, 0.0), 0) - log_text
            tl.store(text + number, tl.where(share == 0, 0.0, -likelihood))
    tl.store(row + at, gradient.to(logits.dtype.element_ty), at < vocabulary)
