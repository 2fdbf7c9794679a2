"""Models from anywhere, side by side on what each of them was asked: a comparison without a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from distilvlm.data.problems import DataError
from distilvlm.evaluate import Evaluation
from distilvlm.evaluate.suites import SUITES, TEXT_SUITES, compared
from distilvlm.recipe.errors import nearest
from distilvlm.report import SAMPLES, write_report
from distilvlm.report.read import read_run

from .execute import Clock
from .facts import Facts, facts_of
from .given import Given, read_given
from .schema import Trend, roles
from .speed import answering_of
from .table import Results, Seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Told:
    """One question set."""

    title: str
    measure: str
    of_encoders: bool = False


@dataclass(frozen=True)
class Gathered:
    """What is compared, as a comparison file would say it."""

    title: str
    questions: Mapping[str, Told]
    differences: Sequence[tuple[str, str]]
    roles: tuple[str, str] | None
    name: str = "gathered"
    description: str = ""
    baselines: Sequence[str] = ()
    trends: Sequence[Trend] = ()
    of_seeds: bool = False


def gather(
    words: Sequence[str],
    directory: str | Path,
    *,
    teacher: str | None = None,
    control: str | None = None,
    measure: bool = False,
    samples: int = SAMPLES,
) -> Results:
    """Compare runs, models and files of answers (`given.read_given`); prints the tables, writes `table.md`,
    `comparison.json`, `report.html` and the answers to the questions that all of a set's models answered.

    Differences are from the control, or else from the model that is named first.

    Args:
        teacher, control: names; default: the models called so. The share of the gap between both that each other
            model closes is told.
        measure: also how fast each model answers and in how much memory; what is known is not measured again.
        samples: questions that the page shows per question set.

    Raises:
        DataError: see `read_given`; files of one set that answer different things; a name that nobody has.
    """
    directory = Path(directory).absolute()
    console = Console()
    clock = Clock(console)
    given = {one.name: one for one in read_given(words)}
    for role, name in (("--teacher", teacher), ("--control", control)):
        if name is not None and name not in given:
            raise DataError(f"{role}: nothing here is called '{name}': {nearest(name, list(given))}")
    directory.mkdir(parents=True, exist_ok=True)
    with clock("answers"):
        rows, told = _rows(given, directory)
    facts: dict[str, Facts] = {}
    for name, one in given.items():
        if one.model is not None:
            with clock(f"{name}: size" + (", speed" if measure else "")):
                facts[name] = _facts(one, directory, measure)
    both = roles(list(given), teacher, control)
    against = both[1] if both is not None else control or next(iter(given))
    differences = [(name, against) for name in given if name != against]
    listed = list(given)
    title = f"{', '.join(listed[:-1])} and {listed[-1]}" if len(listed) > 1 else listed[0]
    seed = Seed(0, rows, {name: one.run for name, one in given.items() if one.run is not None})
    # Models of which there are answers alone stand in the page, too.
    everybody = {name: facts.get(name, Facts()) for name in given}
    results = Results(Gathered(title, told, differences, both), [seed], everybody)
    results.print(console)
    results.write(directory, clock.seconds)
    console.print(f"report: {write_report(directory, samples=samples)}", highlight=False, soft_wrap=True)
    return results


def _rows(given: Mapping[str, Given], directory: Path) -> tuple[dict[str, dict[str, Evaluation]], dict[str, Told]]:
    """Question set → model → its answers to what all of the set's models answered; and what the sets are."""
    rows: dict[str, dict[str, Evaluation]] = {}
    told: dict[str, Told] = {}
    for questions in dict.fromkeys(name for one in given.values() for name in one.answers):
        files = {name: one.answers[questions] for name, one in given.items() if questions in one.answers}
        found = compared(*files.values())
        each = dict(zip(files, found.each, strict=True))
        first = next(iter(each.values()))
        suite = SUITES.get(found.asked.get("suite", "")) or TEXT_SUITES.get(found.asked.get("suite", ""))
        told[questions] = Told(suite.title if suite is not None else questions, first.measure.name)
        rows[questions] = {name: _placed(one, first) for name, one in each.items()}
        for name, one in rows[questions].items():
            one.write(directory / "seed-0" / "answers" / questions / f"{name}.jsonl")
    return rows, told


def _placed(evaluation: Evaluation, first: Evaluation) -> Evaluation:
    """Answers as if the same files had been asked from the same place as the first model's."""
    pairs = zip(evaluation.samples, first.samples, strict=True)
    samples = tuple(replace(own, file=other.file, pictures=other.pictures) for own, other in pairs)
    return replace(evaluation, samples=samples)


def _facts(one: Given, directory: Path, measure: bool) -> Facts:
    assert one.model is not None
    recipe = None if one.run is None else read_run(one.run).recipe
    if recipe is not None and recipe.student.encoder_alone:
        return facts_of(one.model, one.run)
    precision = "fp32" if recipe is None else recipe.machine.precision
    kept = directory / "answering" / f"{one.name}.json"
    return facts_of(one.model, one.run, answering_of(one.model, kept, measure, precision))
