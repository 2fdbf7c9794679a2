"""The quickstart's one table: on a terminal, as Markdown, as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from distilvlm.evaluate import Evaluation, Interval, difference
from distilvlm.models.files import write_whole

COMMAND = "distilvlm quickstart"

PAIRS = (("teacher", "question-only"), ("control", "question-only"), ("distilled", "control"), ("distilled", "teacher"))
"""Differences that the table states, each paired over the same questions."""


@dataclass(frozen=True)
class Comparison:
    """All rows of one seed."""

    seed: int
    rows: dict[str, Evaluation]
    parameters: dict[str, int]  # of the language model

    def gap(self, pair: tuple[str, str]) -> Interval:
        """Exact match of the first minus that of the second, paired, with a 95% interval over pictures."""
        return difference(self.rows[pair[0]], self.rows[pair[1]], "exact")


def print_table(comparisons: Sequence[Comparison], console: Console) -> None:
    """One column per seed."""
    first = comparisons[0]
    table = Table(
        title=f"easy-VQA, the {first.rows['teacher'].n:,} official test questions: exact match in %",
        caption="in brackets 95% bootstrap intervals over pictures",
        caption_justify="left",
    )
    for column in _header(comparisons):
        table.add_column(column, justify="left" if column == "" else "right")
    for cells in _models(comparisons):
        table.add_row(*cells)
    table.add_section()
    for cells in _gaps(comparisons):
        table.add_row(*cells)
    console.print(table)


def write_table(comparisons: Sequence[Comparison], directory: Path, seconds: dict[str, float]) -> None:
    """Write `table.md` and `table.json`, with machine, date, versions and the time of every step."""
    machine = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {_accelerator()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": f"{COMMAND} --seeds {len(comparisons)}",
        "seconds": {step: round(value, 1) for step, value in seconds.items()},
    }
    lines = [_line(_header(comparisons)), "|---" + "|---:" * (len(comparisons) + 1) + "|"]
    lines += [_line(cells) for cells in [*_models(comparisons), *_gaps(comparisons)]]
    about = (
        f"`{machine['command']}`, {machine['date']}, {machine['machine']}, {sum(seconds.values()):.0f} s in this call."
    )
    write_whole(directory / "table.md", ("\n".join(lines) + f"\n\n{about}\n").encode())
    seeds = [
        {
            "seed": one.seed,
            "language_model_parameters": one.parameters,
            "rows": {name: row.summary() for name, row in one.rows.items()},
            "differences": {" - ".join(pair): vars(one.gap(pair)) for pair in PAIRS},
        }
        for one in comparisons
    ]
    content: dict[str, Any] = {**machine, "seeds": seeds}
    write_whole(directory / "table.json", (json.dumps(content, indent=1) + "\n").encode())


def _header(comparisons: Sequence[Comparison]) -> list[str]:
    return ["", "language model", *(f"seed {one.seed}" for one in comparisons)]


def _models(comparisons: Sequence[Comparison]) -> list[list[str]]:
    parameters = comparisons[0].parameters
    return [
        [
            name,
            f"{parameters[name]:,}" if name in parameters else "",
            *(_share(c.rows[name].exact_match) for c in comparisons),
        ]
        for name in comparisons[0].rows
    ]


def _gaps(comparisons: Sequence[Comparison]) -> list[list[str]]:
    return [[f"{a} − {b}", "", *(_points(one.gap((a, b))) for one in comparisons)] for a, b in PAIRS]


def _share(value: Interval) -> str:
    return f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _points(value: Interval) -> str:
    return f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _accelerator() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
