"""What a finished comparison measured, as one small JSON file a seed: `evidence/results/TABLE-SEED.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from distilvlm.evaluate import ACCURATE, EXACT, Evaluation, Figure, Interval, Measure, difference, rescored
from distilvlm.evaluate.encoders import LABELS, OF_FEATURES
from distilvlm.evaluate.grounding import GROUNDING
from distilvlm.evaluate.hallucination import POLLING, Synonyms, captions
from distilvlm.evaluate.text import CHOICES, PERPLEXITY
from distilvlm.models.files import write_whole

from .tables import Table

PLACE = Path(__file__).parent / "results"

MEASURES: Mapping[str, Measure] = {
    "exact": EXACT,
    "accurate": ACCURATE,
    "polling": POLLING,
    "captions": captions(Synonyms([("nothing", ())])),  # answers are judged already: nothing is looked up
    "grounding": GROUNDING,
    "choices": CHOICES,
    "perplexity": PERPLEXITY,
    **LABELS,
    **OF_FEATURES,
}

KEPT = ("title", "description", "machine", "versions", "models", "questions", "measures")
"""What of a comparison's file stands in each seed's."""


@dataclass(frozen=True)
class SeedResult:
    """One seed of one table, as its file says it."""

    told: Mapping[str, Any]

    def row(self, questions: str, figure: str, name: str) -> Interval | None:
        value = self.told["rows"][questions][name][figure]
        return None if value is None else Interval(**value)

    def has(self, questions: str, figure: str, pair: str) -> bool:
        """Whether the difference was taken."""
        return pair in self.told["differences"][questions].get(figure, {})

    def difference(self, questions: str, figure: str, pair: str) -> Interval | None:
        """None where the figure is undefined for one of the two."""
        value = self.told["differences"][questions][figure][pair]
        return None if value is None else Interval(**value)

    def figures(self, questions: str) -> list[Figure]:
        """Those that stand in tables, the main one first."""
        return _headlines(self.told, questions)


def record(table: Table, directory: Path, place: Path = PLACE) -> list[Path]:
    """Write a file for each seed of the comparison that is finished in `directory`; what is there of others stays."""
    told = json.loads((directory / "comparison.json").read_text())
    return [_record(table, directory, told, seed, place) for seed in told["seeds"]]


def _record(table: Table, directory: Path, told: Mapping[str, Any], seed: Mapping[str, Any], place: Path) -> Path:
    rows = {
        name: {who: {one.name: row[one.name] for one in _headlines(told, name)} for who, row in rows.items()}
        for name, rows in seed["rows"].items()
    }
    content = {
        "table": table.name,
        "seed": seed["seed"],
        "command": table.command,
        **{key: told[key] for key in KEPT},
        **_made(directory, seed["runs"].values(), seed["seed"]),
        "rows": rows,
        "differences": _differences(directory / f"seed-{seed['seed']}" / "answers", told, rows),
    }
    file = place / f"{table.name}-{seed['seed']}.json"
    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
    return file


def read(table: str, place: Path = PLACE) -> list[SeedResult]:
    """Every seed of a table that was recorded, in order."""
    found = [json.loads(file.read_text()) for file in place.glob(f"{table}-*.json")]
    return [SeedResult(told) for told in sorted(found, key=lambda told: told["seed"]) if told["table"] == table]


def _figure(told: Mapping[str, Any]) -> Figure:
    return Figure(told["name"], told["title"], lambda _: (), better=told["better"], percent=told["percent"])


def _headlines(told: Mapping[str, Any], questions: str) -> list[Figure]:
    return [_figure(one) for one in told["measures"][told["questions"][questions]["measure"]] if one["headline"]]


def _differences(
    answers: Path, told: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Question set → figure → pair → its paired difference with its interval."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in rows:
        pairs = [pair for pair in told["differences"] if all(who in rows[name] for who in pair)]
        measure = MEASURES[told["questions"][name]["measure"]]
        read: dict[str, Evaluation] = {
            who: rescored(
                answers / name / f"{who}.jsonl", measure=measure, by_picture=bool(told["questions"][name]["pictures"])
            )
            for who in {who for pair in pairs for who in pair}
        }
        found[name] = {
            one.name: {" - ".join(pair): _json(difference(read[pair[0]], read[pair[1]], one.name)) for pair in pairs}
            for one in _headlines(told, name)
        }
    return found


def _json(value: Interval | None) -> dict[str, float] | None:
    return None if value is None else asdict(value)


def _made(directory: Path, runs: Iterable[str], seed: int) -> dict[str, Any]:
    """The seconds from start to finish of each run that was made for this seed, and the day of the last one; runs that
    are shared count for the first seed."""
    spans: list[tuple[datetime, datetime]] = []
    for run in runs:
        if Path(run).parts[0] == f"seed-{seed}":
            about = json.loads((directory / run / "about.json").read_text())
            spans.append((datetime.fromisoformat(about["started"]), datetime.fromisoformat(about["finished"])))
    seconds = sum((finished - started).total_seconds() for started, finished in spans)
    return {"seconds": seconds, "date": max(finished for _, finished in spans).date().isoformat()}
