"""What the doctor has to say about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]
"""error: the run can't succeed, it stops here. warning: it can, but hardly does what was meant. ok: how it stands."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    `check` is a stable name, FAMILY.THING. Every warning and error names the fix.
    """

    check: str
    level: Level
    text: str
    fix: str = ""
    stage: str | None = None  # None: it concerns the whole recipe

    @property
    def family(self) -> str:
        return self.check.partition(".")[0]
