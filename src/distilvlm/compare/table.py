"""A comparison's table: on a terminal, as Markdown, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from distilvlm.evaluate import Evaluation, Figure, Interval, difference, gap_closed
from distilvlm.models.files import write_whole
from distilvlm.runs import about

from .facts import Facts
from .schema import Trend


class Asked(Protocol):
    """What the table says of one question set."""

    @property
    def title(self) -> str: ...
    @property
    def measure(self) -> str: ...  # its name
    @property
    def of_encoders(self) -> bool: ...


class Compared(Protocol):
    """What is compared: a comparison file, or what was gathered."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def questions(self) -> Mapping[str, Asked]: ...
    @property
    def baselines(self) -> Sequence[str]: ...
    @property
    def differences(self) -> Sequence[tuple[str, str]]: ...
    @property
    def trends(self) -> Sequence[Trend]: ...
    @property
    def roles(self) -> tuple[str, str] | None: ...  # teacher and control, between which lies the gap to be closed
    @property
    def of_seeds(self) -> bool: ...  # False: models from anywhere, and one column


@dataclass(frozen=True)
class Seed:
    """All that one seed gave."""

    seed: int
    rows: Mapping[str, Mapping[str, Evaluation]]  # question set -> baseline or run -> its answers
    runs: Mapping[str, Path]  # run -> its directory


class Results:
    """What a comparison measured so far."""

    def __init__(self, comparison: Compared, seeds: Sequence[Seed], facts: Mapping[str, Facts]) -> None:
        self.comparison, self.seeds, self.facts = comparison, seeds, facts

    def gap(self, seed: Seed, questions: str, pair: tuple[str, str]) -> Interval | None:
        """The first's main figure minus the second's, paired, with its 95% interval over pictures; None where one of
        them is undefined."""
        first, second = (seed.rows[questions][name] for name in pair)
        return difference(first, second)

    def closed(self, seed: Seed, questions: str) -> dict[str, Interval | None]:
        """How much of the teacher's lead over the control each other model has made good; None where there is no lead.
        Nothing where either was not asked this set."""
        rows = seed.rows[questions]
        if self.comparison.roles is None or not all(name in rows for name in self.comparison.roles):
            return {}
        teacher, control = (rows[name] for name in self.comparison.roles)
        students = [name for name in self.facts if name in rows and name not in self.comparison.roles]
        return {name: gap_closed(rows[name], control, teacher) for name in students}

    def pairs(self, questions: str) -> list[tuple[str, str]]:
        """The stated differences between two that were asked this set: not every set has every baseline."""
        there = self.seeds[0].rows[questions]
        return [pair for pair in self.comparison.differences if all(name in there for name in pair)]

    def print(self, console: Console) -> None:
        """One table per question set and headline figure, one column per seed."""
        for name, spec in self.comparison.questions.items():
            for figure in self._headlines(name):
                table = Table(
                    title=f"{spec.title}: {self._measure(name, figure)}",
                    caption=f"in brackets 95% {self._any(name).summary()['intervals']}; differences are paired",
                    title_justify="left",
                    caption_justify="left",
                )
                for column in self._header("", name):
                    table.add_column(column, justify="left" if column == "" else "right")
                for cells in self._models(name, figure):
                    table.add_row(*cells)
                table.add_section()
                for cells in [*self._gaps(name, figure), *self._closed(name, figure)]:
                    table.add_row(*cells)
                console.print(table)

    def write(self, directory: Path, seconds: Mapping[str, float]) -> None:
        """Write `table.md` and `comparison.json`, with machine, date, versions and the time of every step."""
        machine = about.machine()
        made = {
            "command": about.typed(about.command()),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": about.in_words(machine),
            "versions": about.versions(),
            "seconds": {step: round(value, 1) for step, value in seconds.items()},
        }
        lines: list[str] = []
        for name in self.comparison.questions:
            for figure in self._headlines(name):
                header = self._header(f"{name}, {self._measure(name, figure)}", name)
                lines += [_line(header), "|---" + "|---:" * (len(header) - 1) + "|"]
                rows = [*self._models(name, figure), *self._gaps(name, figure), *self._closed(name, figure)]
                lines += [_line(cells) for cells in rows]
                lines.append("")
        lines.append(
            f"`{made['command']}`, {made['date']}, {made['machine']}, {sum(seconds.values()):.0f} s in this call."
        )
        write_whole(directory / "table.md", ("\n".join(lines) + "\n").encode())
        content = json.dumps(self._json(directory) | made, indent=1)
        write_whole(directory / "comparison.json", (content + "\n").encode())

    def _json(self, directory: Path) -> dict[str, Any]:
        return {
            "name": self.comparison.name,
            "title": self.comparison.title,
            "description": self.comparison.description,
            "of_seeds": self.comparison.of_seeds,
            "roles": dict(zip(("teacher", "control"), self.comparison.roles or (), strict=False)) or None,
            "models": {name: asdict(facts) for name, facts in self.facts.items()},
            "baselines": list(self.comparison.baselines),
            "measures": {spec.measure: self._figures(name) for name, spec in self.comparison.questions.items()},
            "questions": {
                name: {
                    "title": spec.title,
                    "measure": spec.measure,
                    "n": self._any(name).n,
                    "pictures": self._any(name).summary()["pictures"],
                }
                for name, spec in self.comparison.questions.items()
            },
            "differences": [list(pair) for pair in self.comparison.differences],
            "trends": [trend.model_dump() for trend in self.comparison.trends],
            "seeds": [
                {
                    "seed": seed.seed,
                    "rows": {
                        name: {who: row.summary() for who, row in rows.items()} for name, rows in seed.rows.items()
                    },
                    "differences": {
                        name: {" - ".join(pair): _json(self.gap(seed, name, pair)) for pair in self.pairs(name)}
                        for name in seed.rows
                    },
                    "closed": {
                        name: {who: _json(share) for who, share in self.closed(seed, name).items()}
                        for name in seed.rows
                    },
                    "runs": {run: os.path.relpath(place, directory) for run, place in seed.runs.items()},
                }
                for seed in self.seeds
            ],
        }

    def _any(self, name: str) -> Evaluation:
        """An evaluation of the set, for what is the same in all of them."""
        return next(iter(self.seeds[0].rows[name].values()))

    def _headlines(self, name: str) -> list[Figure]:
        return [figure for figure in self._any(name).measure.figures if figure.headline]

    def _figures(self, name: str) -> list[dict[str, Any]]:
        """What the set's measure tells, for whoever reads the file."""
        fields = ("name", "title", "better", "about", "percent", "headline")
        return [{field: getattr(one, field) for field in fields} for one in self._any(name).measure.figures]

    def _measure(self, name: str, figure: Figure) -> str:
        row = self._any(name)
        pictures = row.summary()["pictures"]
        about = f"{row.n:,} questions" + (f" on {pictures:,} pictures" if pictures else "")
        lower = " (lower is better)" if figure.better == "lower" else ""
        return f"{about}, {figure.title}{' in %' if figure.percent else ''}{lower}"

    def _header(self, first: str, questions: str) -> list[str]:
        part = "encoder" if self.comparison.questions[questions].of_encoders else "language model"
        return [first, part, *(f"seed {seed.seed}" if self.comparison.of_seeds else "all" for seed in self.seeds)]

    def _models(self, name: str, figure: Figure) -> list[list[str]]:
        rows: list[list[str]] = []
        for who in self.seeds[0].rows[name]:
            facts = self.facts.get(who)
            counted = facts and facts.counted
            given = (seed.rows[name][who].figures[figure.name] for seed in self.seeds)
            rows.append([who, f"{counted:,}" if counted else "", *map(figure.cell, given)])
        return rows

    def _gaps(self, name: str, figure: Figure) -> list[list[str]]:
        """Differences are of the main figure alone."""
        if figure != self._any(name).measure.main:
            return []
        return [
            [f"{pair[0]} − {pair[1]}", "", *(figure.cell(self.gap(seed, name, pair), "+") for seed in self.seeds)]
            for pair in self.pairs(name)
        ]

    def _closed(self, name: str, figure: Figure) -> list[list[str]]:
        """The share of the gap that is closed, in %, of the main figure alone."""
        each = [self.closed(seed, name) for seed in self.seeds]
        if figure != self._any(name).measure.main or not each[0] or self.comparison.roles is None:
            return []
        share = Figure("closed", "gap closed", figure.parts)
        teacher, control = self.comparison.roles
        rows: list[list[str]] = []
        for who in each[0]:
            given = [found.get(who) for found in each]
            cells = ["no gap" if one is None else share.cell(one) for one in given]
            rows.append([f"{who}: of the gap {control} → {teacher}, %", "", *cells])
        return rows


def _json(value: Interval | None) -> dict[str, float] | None:
    return None if value is None else asdict(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
