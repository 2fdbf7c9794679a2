"""A teacher's distribution of which only some probabilities are known: what is kept on disk, or comes over a network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sparse:
    """Distributions over the vocabulary, as far as they are known.

    With `tail`, what is left of 1 is the probability of all other ids together: student and teacher are compared over
    the known ids and this one more event, which is a lower bound of the divergence over all ids. Without, nothing is
    left: ids that were drawn from the teacher, each with its share of the draws (unbiased for forward KL's gradient,
    arXiv 2503.16870).
    """

    ids: Tensor  # [rows, kept] int64, -1 where a row has fewer
    log_probabilities: Tensor  # [rows, kept] fp32, nats; −inf where there is no id
    tail: bool
