"""What is in a data source: turns, answers, pictures, tokens, and what two sources share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from distilvlm.data import geometry
from distilvlm.data.contents import Contents
from distilvlm.data.readers import Source
from distilvlm.data.records import PICTURE, Preferences

COMMON = 10
"""Most common answers that are told."""


@dataclass(frozen=True)
class Spread:
    """A distribution of whole numbers."""

    mean: float
    median: int
    ninetieth: int  # nine tenths are at most this
    longest: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        if not len(values):
            return cls(0.0, 0, 0, 0)
        at = np.quantile(values, (0.5, 0.9, 1), method="inverted_cdf")
        return cls(float(np.mean(values)), *(int(value) for value in at))


@dataclass(frozen=True)
class Statistics:
    """Counts over the rows of a source that its reader could use.

    Of preferences, `answers` (and what is said of them) are those that were chosen or rated desirable; the others are
    counted apart, because nobody should be right by giving them.
    """

    rows: int
    bad: int
    with_pictures: int
    pictures: int  # different files
    words: Spread  # of a row, all turns; of a pair, those with the chosen answer
    answers: int
    different_questions: int
    different_answers: int
    answers_per_row: dict[int, int]  # answers → rows
    answer_words: Spread
    common: tuple[tuple[str, int], ...]  # answer → times: the first is what always guessing the same would get right
    pairs: int = 0
    rated: int = 0
    desirable: int = 0  # of the rated
    rejected_words: Spread = Spread(0.0, 0, 0, 0)  # of an answer that was rejected or rated undesirable
    pictures_per_row: dict[int, int] = field(default_factory=dict)  # pictures → rows

    @property
    def majority(self) -> float:
        """Share of the most common answer: a model that never looks is right so often."""
        return self.common[0][1] / self.answers if self.answers else 0.0


def describe(source: Source) -> Statistics:
    """Count a source. Answers are the same if they are but for case and space at their ends."""
    rows = shown = 0
    pictures: set[str] = set()
    words: list[int] = []
    answer_words: list[int] = []
    questions: set[str] = set()
    answers: Counter[str] = Counter()
    written: dict[str, str] = {}
    per_row: Counter[int] = Counter()
    kinds: Counter[Preferences | None] = Counter()
    desirable = 0
    rejected_words: list[int] = []
    for record in source.records:
        rows += 1
        kinds[record.preferences] += 1
        desirable += bool(record.desirable)
        shown += bool(record.images)
        pictures.update(record.images)
        texts = [(turn.role, turn.text.replace(PICTURE, " ").strip()) for turn in record.turns]
        words.append(sum(len(text.split()) for _, text in texts))
        questions.update(text for role, text in texts if role == "user")
        good = record.answers if record.desirable is not False else record.answers[:-1]
        rejected = (*record.rejected().answers[-1:], *record.answers[len(good) :])
        rejected_words.extend(len(answer.split()) for answer in rejected)
        per_row[len(record.answers)] += 1
        for answer in good:
            same = answer.strip().casefold()
            written.setdefault(same, answer.strip())
            answers[same] += 1
            answer_words.append(len(answer.split()))
    return Statistics(
        rows=rows,
        bad=len(source.bad),
        with_pictures=shown,
        pictures=len(pictures),
        words=Spread.of(words),
        answers=len(answer_words),
        different_questions=len(questions),
        different_answers=len(answers),
        answers_per_row=dict(sorted(per_row.items())),
        answer_words=Spread.of(answer_words),
        common=tuple((written[answer], count) for answer, count in answers.most_common(COMMON)),
        pairs=kinds["pairs"],
        rated=kinds["rated"],
        desirable=desirable,
        rejected_words=Spread.of(rejected_words),
        pictures_per_row=dict(sorted(Counter(source.records.pictures.tolist()).items())),
    )


@dataclass(frozen=True)
class PictureStatistics:
    """The different pictures of a source. Quantiles are: smallest, of 10%, 50% and 90% at most, largest."""

    pictures: int
    unreadable: int
    shorter: tuple[float, ...]  # side in pixels
    longer: tuple[float, ...]
    aspect: tuple[float, ...]  # longer by shorter side
    portrait: int  # higher than wide
    repeated_rows: int  # rows that say and show what an earlier one does
    repeated: int | None  # pictures that are the same file as an earlier one under another name; None: not looked at

    @classmethod
    def of(cls, contents: Contents) -> PictureStatistics:
        sizes = contents.sizes[contents.sizes[:, 0] > 0]
        shorter, longer = sizes.min(axis=1, initial=2**31 - 1), sizes.max(axis=1, initial=0)
        return cls(
            pictures=len(contents.sizes),
            unreadable=len(contents.problems),
            shorter=quantiles(shorter),
            longer=quantiles(longer),
            aspect=quantiles(longer / shorter),
            portrait=int((sizes[:, 1] > sizes[:, 0]).sum()),
            repeated_rows=_repeated(contents.same_rows()),
            repeated=None if contents.digests is None else _repeated(contents.same_pictures()),
        )


@dataclass(frozen=True)
class TokenStatistics:
    """Tokens of a source's texts, without template and pictures."""

    tokens: int
    answers: int  # tokens of these
    row: tuple[float, ...]  # quantiles of a row's tokens, see `PictureStatistics`
    answer: tuple[float, ...]  # of those of a row's answers
    longer: int | None  # rows with more than `max_length`; None: not asked for

    @classmethod
    def of(cls, counts: np.ndarray, max_length: int | None = None) -> TokenStatistics:
        """Args: counts: [records, 2], see `contents.tokens`."""
        every, answers = counts.sum(axis=0, dtype=np.int64)
        longer = None if max_length is None else int((counts[:, 0] > max_length).sum())
        return cls(int(every), int(answers), quantiles(counts[:, 0]), quantiles(counts[:, 1]), longer)


def quantiles(values: np.ndarray) -> tuple[float, ...]:
    """The smallest, what 10%, 50% and 90% have at most, and the largest; none of no values."""
    if not len(values):
        return ()
    return tuple(round(float(value), 2) for value in np.quantile(values, (0, 0.1, 0.5, 0.9, 1), method="inverted_cdf"))


def _repeated(groups: Sequence[np.ndarray]) -> int:
    return sum(len(group) - 1 for group in groups)


@dataclass(frozen=True)
class Shared:
    """Pictures that two sources both show."""

    pictures: int  # of the second source
    rows: int  # of the second source that show one of them
    examples: tuple[tuple[str, str], ...]  # files of the first and the second source


def shared(first: Source, second: Source, content: bool = False) -> Shared:
    """Pictures of `second` that `first` shows, too: the same file, or with `content` any file of the same bytes.

    Raises:
        PictureError: a picture can't be read (with `content`).
    """
    key = geometry.content if content else os.path.realpath
    there = _by_key(first, key)
    here = _by_key(second, key)
    both = [same for same in here if same in there]
    files = {name for same in both for name in here[same]}
    rows = sum(any(name in files for name in record.images) for record in second.records)
    return Shared(len(files), rows, tuple((there[same][0], here[same][0]) for same in both[:COMMON]))


def _by_key(source: Source, key: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in _different(name for record in source.records for name in record.images):
        found.setdefault(key(name), []).append(name)
    return found


def _different(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
