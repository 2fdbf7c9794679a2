"""What can be wrong with data, and what happens then: stop with names, or quarantine and count."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from distilvlm.data.batch import BadRow

logger = logging.getLogger(__name__)

SHOWN = 10
"""Bad rows that a fatal error lists before it only counts."""


class DataError(ValueError):
    """Data that can't be used: the message names file, row and field, and what to do."""


class RowError(ValueError):
    """One row can't be used. Whoever knows the row's key turns this into a `BadRow`."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return f"field '{self.field}': {self.reason}"


def raise_or_quarantine(bad: Sequence[BadRow], policy: Literal["fatal", "quarantine"]) -> list[dict[str, Any]]:
    """Apply a recipe's `machine.on_bad_row` to the rows that can't be used.

    Returns:
        one JSON-able entry per bad row (source, file, row, field, reason), for the caller's quarantine file; empty
        when nothing is bad.

    Raises:
        DataError: `policy` is "fatal" and there are bad rows; lists the first ten and the total.
    """
    if not bad:
        return []
    if policy == "fatal":
        lines = [f"  {row}" for row in bad[:SHOWN]]
        if len(bad) > SHOWN:
            lines.append(f"  ... and {len(bad) - SHOWN} more")
        count = "1 row can't" if len(bad) == 1 else f"{len(bad)} rows can't"
        advice = "Mend them, or set machine.on_bad_row=quarantine to leave them out and list them in a file."
        raise DataError("\n".join([f"{count} be used:", *lines, advice]))
    logger.warning("%d rows can't be used and are quarantined; the first: %s", len(bad), bad[0])
    return [{**asdict(row.key), "field": row.field, "reason": row.reason} for row in bad]
