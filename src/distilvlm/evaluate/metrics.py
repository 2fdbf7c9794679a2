"""When an answer counts as right, and how sure a mean over answers is."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
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


Parts = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]
"""Numerators and denominators of a ratio of sums, [n] each."""

Transform = Callable[[np.ndarray], np.ndarray]
"""What a figure is of a ratio of sums, [m] each."""

Combined = Callable[[np.ndarray], np.ndarray]
"""What a figure is of several sums: [m, columns] to [m]; not a number where it is undefined."""


@dataclass(frozen=True)
class Interval:
    """A mean, or another figure, and its 95% bootstrap interval, as shares (0 to 1; differences -1 to 1)."""

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
    found = ratio(values, np.ones(np.shape(values)), clusters, resamples, seed)
    assert found is not None  # as many values as there are can't be none
    return found


def ratio(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    transform: Transform | None = None,
) -> Interval | None:
    """Sum of `numerators` [n] / sum of `denominators` [n] with its 95% interval: both sums are drawn anew, together.

    Precision, F1 = 2 TP / (2 TP + FP + FN) and CHAIR are such figures, and no means. None where the denominators sum to
    0: the figure is undefined then. Resamples in which it is undefined have no part in the interval.

    Args:
        clusters: as of `interval`.
        transform: what the figure is of that quotient: a perplexity is exp of a mean.

    Raises ValueError without values, or when the numbers of numerators and denominators differ.
    """
    columns = _columns(numerators, denominators)
    if not columns[:, 1].sum():
        return None
    of = transform or _as_it_is
    return _bootstrap(columns, lambda totals: of(divided(totals[:, 0], totals[:, 1])), clusters, resamples, seed)


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
    found = paired_ratios((a, np.ones(np.shape(a))), (b, np.ones(np.shape(b))), clusters, resamples, seed)
    assert found is not None
    return found


def paired_ratios(
    a: Parts,
    b: Parts,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    transform: Transform | None = None,
) -> Interval | None:
    """The first `ratio` minus the second, over the same samples, with its 95% interval; None where one is undefined.

    Raises ValueError when the numbers of samples differ.
    """
    first, second = _columns(*a), _columns(*b)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference needs the same samples twice, not {len(first)} and {len(second)}")
    if transform is None and (first[:, 1] == second[:, 1]).all():
        return ratio(first[:, 0] - second[:, 0], first[:, 1], clusters, resamples, seed)
    if not first[:, 1].sum() or not second[:, 1].sum():
        return None

    of = transform or _as_it_is

    def difference(totals: np.ndarray) -> np.ndarray:
        return of(divided(totals[:, 0], totals[:, 1])) - of(divided(totals[:, 2], totals[:, 3]))

    return _bootstrap(np.concatenate([first, second], axis=1), difference, clusters, resamples, seed)


def of_sums(
    columns: np.ndarray,
    figure: Combined,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """A figure of the sums of `columns` [n, columns] (BLEU, a total over subtasks) with its 95% interval: all sums are
    drawn anew, together. None where it is undefined.

    Args:
        clusters: as of `interval`.
    """
    if np.isnan(figure(columns.sum(axis=0, keepdims=True))[0]):
        return None
    return _bootstrap(columns, figure, clusters, resamples, seed)


def paired_of_sums(
    a: np.ndarray,
    b: np.ndarray,
    figure: Combined,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """The figure of `a` [n, columns] minus that of `b`, over the same samples, with its 95% interval.

    Raises ValueError when the numbers of samples differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"a paired difference needs the same samples twice, not {len(a)} and {len(b)}")
    width = a.shape[1]

    def difference(totals: np.ndarray) -> np.ndarray:
        return figure(totals[:, :width]) - figure(totals[:, width:])

    return of_sums(np.concatenate([a, b], axis=1), difference, clusters, resamples, seed)


def _columns(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> np.ndarray:
    """[n, 2] of a ratio's parts."""
    parts = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if parts[0].shape != parts[1].shape:
        raise ValueError(f"a ratio needs as many denominators as numerators, not {parts[1].size} and {parts[0].size}")
    if parts[0].ndim != 1 or not parts[0].size:
        raise ValueError(f"a mean needs a list of at least one value, not shape {list(parts[0].shape)}")
    return np.stack(parts, axis=1)


def _as_it_is(values: np.ndarray) -> np.ndarray:
    return values


def divided(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Not a number where there is nothing to divide by."""
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators != 0)


def _bootstrap(
    columns: np.ndarray,
    figure: Callable[[np.ndarray], np.ndarray],
    clusters: Sequence[Hashable] | None,
    resamples: int,
    seed: int,
) -> Interval:
    """`figure` of the sums of `columns` [n, columns], and of the sums of resamples; it maps [m, columns] to [m]."""
    sums = _clustered(columns, clusters)
    # Clusters with equal sums are interchangeable: drawing how often each kind comes is the same bootstrap and, for
    # right-or-wrong values, thousands of times less work.
    kinds, counts = np.unique(sums, axis=0, return_counts=True)
    random = np.random.Generator(np.random.Philox(seed))
    block = max(1, _CHUNK // len(kinds))
    drawn_figures: list[np.ndarray] = []
    for start in range(0, resamples, block):
        drawn = random.multinomial(len(sums), counts / len(sums), size=min(block, resamples - start))
        drawn_figures.append(figure(drawn @ kinds))
    low, high = np.nanquantile(np.concatenate(drawn_figures), [0.025, 0.975])
    return Interval(float(figure(sums.sum(axis=0, keepdims=True))[0]), float(low), float(high))


def _clustered(columns: np.ndarray, clusters: Sequence[Hashable] | None) -> np.ndarray:
    """Sums of every cluster, [clusters, columns]."""
    if clusters is None:
        return columns
    if len(clusters) != len(columns):
        raise ValueError(f"there are {len(clusters)} cluster names for {len(columns)} values")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    return np.stack([np.bincount(index, weights=column) for column in columns.T], axis=1)
