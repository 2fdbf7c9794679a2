"""Which of a teacher's visual rows belongs to which of the student's, where there are more of them.

EM-KD (arXiv 2511.21106): of every picture the assignment of rows with the least sum of Manhattan distances between
their raw logits, Σ_v |z_T − z_S|, which the Hungarian algorithm finds. Each of the student's rows gets one of the
teacher's, and none of these serves twice.
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distilvlm.losses.relation import accumulation

BLOCK = 4096
"""Ids of which the logits of a picture exist at a time."""


@torch.no_grad()
def assigned(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, common: int
) -> Tensor:
    """For each of the student's rows of one picture the teacher's row that is its own, [visual] int64.

    student_hidden: [visual, d_student]; teacher_hidden: [visual_teacher, d_teacher], at least as many.
    common: ids that are compared, the first of both heads.
    """
    precision = accumulation(student_hidden, teacher_hidden)
    ours, theirs = student_hidden.to(precision), teacher_hidden.to(precision)
    cost = ours.new_zeros(ours.shape[0], theirs.shape[0])
    with torch.autocast(ours.device.type, enabled=False):
        for start in range(0, common, BLOCK):
            block = slice(start, min(start + BLOCK, common))
            z_student, z_teacher = (
                ours @ student_head[block].to(precision).T,
                theirs @ teacher_head[block].to(precision).T,
            )
            cost += distances(z_student, z_teacher)
    return torch.from_numpy(cheapest(cost.double().cpu().numpy())).to(student_hidden.device)


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Manhattan distances of rows, [n, m]; first: [n, ids], second: [m, ids].

    On a CPU id by id, over all pairs at a time: `torch.cdist` visits pair by pair, which takes three times as long
    (`benchmarks/assignment.py`).
    """
    if first.device.type != "cpu":
        return torch.cdist(first, second, p=1)
    found = first.new_zeros(first.shape[0], second.shape[0])
    apart = torch.empty_like(found)
    for ours, theirs in zip(first.T.contiguous()[:, :, None], second.T.contiguous()[:, None], strict=True):
        torch.sub(ours, theirs, out=apart)
        found += apart.abs_()
    return found


def cheapest(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of every row, no column twice, with the least sum: exact, by shortest augmenting paths.

    The Hungarian method in the form of Jonker and Volgenant (Crouse 2016): rows join one by one, each by the path of
    least reduced cost to a free column, and prices keep every reduced cost at or above 0.

    Raises `ValueError` for more rows than columns.
    """
    rows, columns = cost.shape
    if rows > columns:
        raise ValueError(f"{rows} rows can't each have one of {columns} columns")
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    owner = np.full(columns, -1)  # [columns] row that has it
    for first in range(rows):
        distance = np.full(columns, np.inf)  # of the shortest path from `first`
        before = np.full(columns, -1)  # row that the path comes from
        done = np.zeros(columns, dtype=bool)
        reached: list[int] = []
        row, length = first, 0.0
        while True:
            through = length + cost[row] - row_price[row] - column_price
            shorter = ~done & (through < distance)
            distance[shorter], before[shorter] = through[shorter], row
            column = int(np.where(done, np.inf, distance).argmin())
            length = float(distance[column])
            done[column] = True
            if owner[column] < 0:
                break
            reached.append(column)
            row = int(owner[column])
        row_price[first] += length
        row_price[owner[reached]] += length - distance[reached]
        column_price[reached] -= length - distance[reached]
        while True:  # back along the path, every row takes the column that it led to
            row = int(before[column])
            owner[column], column = row, int(np.flatnonzero(owner == row)[0]) if row != first else -1
            if row == first:
                break
    found = np.empty(rows, dtype=np.int64)
    taken = np.flatnonzero(owner >= 0)
    found[owner[taken]] = taken
    return found
