"""What one pass over a stage's data found, before its first step: per source, and together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from distilvlm.data.batch import BadRow, SampleKey
from distilvlm.data.sampler import showings


@dataclass
class SourceReport:
    """Counts over the usable samples of one source."""

    weight: float = 1.0  # how often an epoch shows each sample
    samples: int = 0
    pairs: int = 0  # samples of two answers
    rated: int = 0  # samples of one rated answer, which come with another's
    desirable: int = 0  # rated samples whose answer is a good one
    with_pictures: int = 0
    pictures: int = 0
    tokens: int = 0  # positions of all sequences, visual tokens included
    median: int = 0  # positions that half of the sequences have at most; nine tenths; 99 of 100; all
    ninetieth: int = 0
    ninety_ninth: int = 0
    longest: int = 0
    learned: int = 0  # tokens with a target
    cut: int = 0  # samples whose end was cut off at max_length
    neutralised: int = 0  # typed image tokens made harmless
    markers_added: int = 0
    answers_dropped: int = 0
    bad: int = 0  # rows that can't be used
    paired: int = 0  # learned tokens with a partner in a row that the teacher reads
    teachers_longest: int = 0  # positions of the longest row that the teacher reads; 0 where it reads the student's

    @property
    def text_only(self) -> int:
        return self.samples - self.with_pictures

    @property
    def sequences(self) -> int:
        """A sample is one, or two where it is a preference."""
        return self.samples + self.pairs + self.rated

    @property
    def mean(self) -> float:
        """Positions of a sequence."""
        return self.tokens / self.sequences if self.samples else 0.0

    @property
    def showings(self) -> int:
        """Samples of it in an epoch."""
        return showings(self.samples, self.weight)

    def add(self, other: SourceReport) -> None:
        """Count what another look at samples of the source has counted; lengths are `measure`d of all together."""
        for count in fields(self):
            own, more = getattr(self, count.name), getattr(other, count.name)
            if count.name == "teachers_longest":
                self.teachers_longest = max(own, more)
            elif count.name not in ("weight", "median", "ninetieth", "ninety_ninth", "longest"):
                setattr(self, count.name, own + more)

    def measure(self, lengths: np.ndarray) -> None:
        """Note the lengths (positions) of all sequences."""
        if len(lengths):
            at = np.quantile(lengths, (0.5, 0.9, 0.99, 1), method="inverted_cdf")
            self.median, self.ninetieth, self.ninety_ninth, self.longest = (int(value) for value in at)


@dataclass
class DataReport:
    """What is known of a stage's sources, and every row that can't be used (its reader's findings included)."""

    sources: dict[str, SourceReport] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)

    @classmethod
    def restored(cls, content: Mapping[str, Any]) -> DataReport:
        """The report whose `as_json` was `content`."""
        bad = [BadRow(SampleKey(**row["key"]), row["field"], row["reason"]) for row in content["bad"]]
        return cls({name: SourceReport(**counts) for name, counts in content["sources"].items()}, bad)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def samples(self) -> int:
        return self._sum("samples")

    @property
    def with_pictures(self) -> int:
        return self._sum("with_pictures")

    @property
    def text_only(self) -> int:
        return self._sum("text_only")

    @property
    def pictures(self) -> int:
        return self._sum("pictures")

    @property
    def pairs(self) -> int:
        return self._sum("pairs")

    @property
    def rated(self) -> int:
        return self._sum("rated")

    @property
    def desirable(self) -> int:
        return self._sum("desirable")

    @property
    def sequences(self) -> int:
        return self._sum("sequences")

    @property
    def tokens(self) -> int:
        return self._sum("tokens")

    @property
    def mean(self) -> float:
        """Positions of a sequence."""
        return self.tokens / self.sequences if self.samples else 0.0

    @property
    def learned(self) -> int:
        return self._sum("learned")

    @property
    def paired(self) -> int:
        return self._sum("paired")

    @property
    def aligned(self) -> float | None:
        """Share of the learned tokens that have a partner in a row of the teacher's; None where it reads the
        student's."""
        return self.paired / max(1, self.learned) if self.teachers_longest else None

    @property
    def teachers_longest(self) -> int:
        return max((source.teachers_longest for source in self.sources.values()), default=0)

    @property
    def cut(self) -> int:
        return self._sum("cut")

    @property
    def neutralised(self) -> int:
        return self._sum("neutralised")

    @property
    def markers_added(self) -> int:
        return self._sum("markers_added")

    @property
    def answers_dropped(self) -> int:
        return self._sum("answers_dropped")

    @property
    def longest(self) -> int:
        return max((source.longest for source in self.sources.values()), default=0)

    @property
    def showings(self) -> int:
        """Samples of an epoch, weights counted."""
        return self._sum("showings")

    def share(self, name: str) -> float:
        """Of an epoch's samples, those of source `name`."""
        return self.sources[name].showings / self.showings if self.showings else 0.0

    def _sum(self, count: str) -> int:
        return sum(getattr(source, count) for source in self.sources.values())

    def __str__(self) -> str:
        if not self.learned:  # pictures alone
            return f"{self.samples} pictures; {len(self.bad)} rows can't be used"
        kinds = f"{self.pairs} pairs, " if self.pairs else ""
        if self.rated:
            kinds += f"rated: {self.desirable} desirable, {self.rated - self.desirable} not; "
        text = (
            f"{self.samples} samples ({kinds}{self.with_pictures} with pictures, {self.text_only} text only), "
            f"{self.mean:.0f} positions on average, {self.longest} at most; {self.learned} tokens to learn; "
            f"{self.cut} samples cut at the end, {self.neutralised} typed image tokens neutralised, "
            f"{self.markers_added} missing markers added, {self.answers_dropped} leading answers left out; "
            f"{len(self.bad)} rows can't be used"
        )
        if self.aligned is not None:
            text += f"; {self.aligned:.1%} of the tokens to learn have a partner in the teacher's rows"
        if len(self.sources) > 1:
            text += "; an epoch is " + ", ".join(f"{self.share(name):.0%} {name}" for name in self.sources)
        return text
