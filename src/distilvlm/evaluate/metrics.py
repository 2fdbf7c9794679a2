"""When an answer counts as right, and how sure a mean over answers is."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_CHUNK = 2_000_000  # elements of one block of resamples: 16 MB of counts

# The lists of the official VQA evaluation (GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py).
_ARTICLES = frozenset({"a", "an", "the"})
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
_APOSTROPHE = re.compile(r"['’]")


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% bootstrap interval, as shares (0 to 1; differences -1 to 1)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}% ({100 * self.low:.1f} to {100 * self.high:.1f})"


def exact_match(prediction: str, answer: str) -> bool:
    """The same string but for space at the ends."""
    return prediction.strip() == answer.strip()


def accurate(prediction: str, answer: str) -> bool:
    """The same answer after `normalise`: the rule of VQA with one reference answer."""
    return normalise(prediction) == normalise(answer)


def normalise(text: str) -> str:
    """Lower case, no punctuation, number words as digits, no articles: the rules of the official VQA evaluation.

    Two departures: apostrophes are taken off instead of put in by its table of contractions (both make "dont" and
    "don't" equal), and an answer that consists of nothing but articles is kept ("A" is a choice in many data sets).
    """
    text = _THOUSANDS.sub("", text.lower())
    text = _FULL_STOP.sub("", _APOSTROPHE.sub("", _PUNCTUATION.sub(" ", text)))
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of `values` [n] with the 95% percentile interval of a seeded bootstrap.

    Args:
        clusters: [n] what each value belongs to, e.g. its picture. Whole clusters are drawn then, since questions on
            one picture are not independent; None draws single values.

    Values that are all equal give an interval without width, as every bootstrap does. Raises ValueError without values.
    """
    sums, sizes = _clustered(np.asarray(values, dtype=np.float64), clusters)
    # Clusters with equal sum and size are interchangeable: drawing how often each kind comes is the same bootstrap and,
    # for right-or-wrong values, thousands of times less work.
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    random = np.random.Generator(np.random.Philox(seed))
    block = max(1, _CHUNK // len(kinds))
    means: list[np.ndarray] = []
    for start in range(0, resamples, block):
        drawn = random.multinomial(len(sums), counts / len(sums), size=min(block, resamples - start))
        totals = drawn @ kinds  # [resamples, 2]: sum of the values, number of values
        means.append(totals[:, 0] / totals[:, 1])
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high))


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of a - b over the same samples [n], with its 95% interval: every resample draws the same samples of both.

    Raises ValueError when the numbers of samples differ.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference needs the same samples twice, not {first.size} and {second.size}")
    return interval(first - second, clusters, resamples, seed)


def _clustered(values: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """(sum, size) of every cluster, [clusters] each."""
    if values.ndim != 1 or not values.size:
        raise ValueError(f"a mean needs a list of at least one value, not shape {list(values.shape)}")
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != values.size:
        raise ValueError(f"there are {len(clusters)} cluster names for {values.size} values")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)
