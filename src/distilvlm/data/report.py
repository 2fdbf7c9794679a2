"""What one pass over a stage's data found, before its first step."""

from __future__ import annotations

from dataclasses import dataclass, field

from distilvlm.data.batch import BadRow


@dataclass
class DataReport:
    """Counts over the usable samples of a stage, and every row that can't be used (its reader's findings included)."""

    samples: int = 0
    with_pictures: int = 0
    pictures: int = 0
    tokens: int = 0  # positions of all samples, visual tokens included
    longest: int = 0  # positions of the longest sample
    learned: int = 0  # tokens with a target
    cut: int = 0  # samples whose end was cut off at max_length
    neutralised: int = 0  # typed image tokens made harmless
    markers_added: int = 0
    answers_dropped: int = 0
    bad: list[BadRow] = field(default_factory=list)

    @property
    def text_only(self) -> int:
        return self.samples - self.with_pictures

    def __str__(self) -> str:
        mean = self.tokens / self.samples if self.samples else 0
        return (
            f"{self.samples} samples ({self.with_pictures} with pictures, {self.text_only} text only), "
            f"{mean:.0f} positions on average, {self.longest} at most; {self.learned} tokens to learn; "
            f"{self.cut} samples cut at the end, {self.neutralised} typed image tokens neutralised, "
            f"{self.markers_added} missing markers added, {self.answers_dropped} leading answers left out; "
            f"{len(self.bad)} rows can't be used"
        )
