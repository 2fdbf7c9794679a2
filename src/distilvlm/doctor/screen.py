"""Findings on a terminal, or in a log file."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .finding import Finding
from .template import CLOSE, OPEN

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow bold"), "error": ("✗", "red bold")}

FAMILIES = {
    "recipe": "recipe",
    "student": "student",
    "teacher": "teacher",
    "vocabulary": "vocabulary",
    "visual": "visual tokens",
    "template": "template",
    "data": "data",
    "rows": "rows",
    "preferences": "preferences",
    "parts": "parts",
    "experts": "experts",
    "terms": "loss terms",
    "settings": "settings",
    "disk": "disk",
}
"""Family -> its heading, in the order of a screen."""


def print_findings(findings: Iterable[Finding], console: Console) -> None:
    """One line per finding, grouped by family, its fix below it; then a line that counts."""
    found = list(findings)
    ordered = sorted(found, key=lambda finding: [*FAMILIES].index(finding.family))
    for family, members in groupby(ordered, key=lambda finding: finding.family):
        console.print(Text(FAMILIES[family], style="bold"))
        for finding in members:
            _print(finding, console)
    console.print(Text.assemble(*_counts(found)))


def _print(finding: Finding, console: Console) -> None:
    mark, style = MARKS[finding.level]
    head, _, drawing = finding.text.partition("\n") if finding.check == "template.picture" else (finding.text, "", "")
    line = Text() if finding.stage is None else Text(f"{finding.stage}: ", style="bold")
    line.append(head)
    if finding.fix:
        line.append("\n→ ", style="bold").append(finding.fix)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=1)
    grid.add_column(overflow="fold")
    grid.add_row(Text(mark, style=style), line)
    console.print(Padding(grid, (0, 0, 0, 2), expand=False))
    if drawing:
        console.print(Padding(_drawing(drawing, console), (0, 0, 0, 6), expand=False))


def _drawing(text: str, console: Console) -> Text:
    """What is learned in colour on a terminal, between its marks elsewhere."""
    if not console.is_terminal or console.color_system is None:
        return Text(text, overflow="fold")
    drawn = Text(overflow="fold")
    for index, piece in enumerate(text.split(OPEN)):
        learned, _, rest = piece.rpartition(CLOSE) if index else ("", "", piece)
        drawn.append(learned, style="green bold").append(rest, style="dim")
    return drawn


def _counts(found: list[Finding]) -> list[tuple[str, str] | str]:
    counts = {level: sum(finding.level == level for finding in found) for level in MARKS}
    parts: list[tuple[str, str] | str] = []
    for level, (mark, style) in MARKS.items():
        noun = level if level == "ok" or counts[level] == 1 else f"{level}s"
        parts += [", " if parts else "", (f"{mark} {counts[level]} {noun}", style if counts[level] else "dim")]
    return parts
