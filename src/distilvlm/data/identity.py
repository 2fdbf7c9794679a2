"""What a sequence is to a frozen model, as hashes: what it thinks of the same again is the same, whichever file, row or
recipe it comes from.

A causal model's hidden states of a picture's rows depend on what stands before them and on nothing behind: a picture is
known by itself and by the tokens and pictures before it, so that all questions about one picture share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distilvlm.data.batch import IGNORED

LENGTH = 32
"""Hexadecimal digits of a key: 128 bits, where a billion keys collide with a chance of 1 in 10²¹."""


@dataclass(frozen=True)
class Identity:
    """Keys of what a sequence asks a teacher: of its answers, and of each of its pictures."""

    answers: str  # tokens, which of them are learned, and the pictures' content
    pictures: tuple[str, ...]  # of each: it, and the tokens and pictures before it
    responses: int  # rows of its answers


def identify(input_ids: Tensor, labels: Tensor, placeholder_positions: Tensor, contents: Sequence[str]) -> Identity:
    """The identity of one sequence.

    Args:
        input_ids, labels: [length] int64, as in Sample.
        placeholder_positions: [pictures * placeholders] int64.
        contents: SHA-256 of each picture's file.
    """
    learned = labels != IGNORED
    learned[:1] = False  # nothing predicts the first
    answers = _key(b"answers", input_ids, placeholder_positions, learned.nonzero(), contents)
    pictures: list[str] = []
    each = len(placeholder_positions) // max(1, len(contents))
    for number in range(1, len(contents) + 1):
        places = placeholder_positions[: number * each]
        pictures.append(_key(b"picture", input_ids[: int(places[-1]) + 1], places, None, contents[:number]))
    return Identity(answers, tuple(pictures), int(learned.sum()))


def _key(kind: bytes, ids: Tensor, places: Tensor, learned: Tensor | None, contents: Sequence[str]) -> str:
    found = hashlib.sha256(kind)
    for tensor in (ids, places, *(() if learned is None else (learned,))):
        found.update(f"{tensor.numel()}:".encode() + tensor.to(torch.int64).contiguous().numpy().tobytes())
    found.update("".join(contents).encode())
    return found.hexdigest()[:LENGTH]
