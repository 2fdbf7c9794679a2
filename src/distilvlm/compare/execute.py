"""Make every run of a comparison for every seed, ask the students, say who is better; what is finished is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from distilvlm.evaluate import Evaluation
from distilvlm.models.files import sweep, write_whole
from distilvlm.models.packaged import prepare
from distilvlm.recipe import TEXT, Recipe, RecipeError, load_recipe
from distilvlm.recipe.errors import nearest
from distilvlm.report import SAMPLES, write_report
from distilvlm.runs.execute import run
from distilvlm.runs.lock import locked

from .ask import Asker
from .facts import Facts, facts_of
from .prepare import converted, keep_features
from .questions import read_questions
from .schema import Comparison, load_comparison
from .speed import answering_of
from .table import Results, Seed


def compare(
    file: str | Path, directory: str | Path, seeds: int = 1, *, measure: bool = False, samples: int = SAMPLES
) -> Results:
    """Train and compare; prints the tables, writes `table.md`, `comparison.json` and `report.html` into `directory`.

    The same call continues what was interrupted.

    Args:
        measure: also how fast each student answers and in how much memory; what is known is not measured again.
        samples: questions that the page shows per question set.

    Raises:
        RecipeError: the comparison or one of its recipes is wrong; before anything is made.
        InUseError: another process works in the directory.
        DataError, RunError, TeacherError, NonFiniteError: as the runs.
    """
    directory = Path(directory).absolute()
    comparison = load_comparison(file, directory)
    plans = [_Plan(comparison, directory, seed) for seed in range(seeds)]
    for plan in plans:
        # A fault in the last one must not come to light after hours.
        _require_workflows(comparison, plan.recipes())
        _check_asked(comparison, plan.recipes())
    with locked(directory):
        return _make(comparison, directory, plans, measure, samples)


def _make(comparison: Comparison, directory: Path, plans: Sequence[_Plan], measure: bool, samples: int) -> Results:
    console = Console()
    clock = Clock(console)
    with clock("weights and data"):
        sweep(directory)
        if comparison.prepare.weights:
            prepare(comparison.prepare.weights, directory / "weights")
        for name, spec in comparison.prepare.data.items():
            converted(name, spec, directory / "data")
    questions = read_questions(comparison.questions)
    words = [one for one in comparison.questions.values() if not one.of_encoders]
    asker = Asker(questions)
    # Before the runs: what is wrong with the questions must not come to light after hours.
    blind = {name: one.baselines() for name, one in questions.items()}
    done: list[Seed] = []
    facts: dict[str, Facts] = {}
    kept: set[str | None] = {None}
    for plan in plans:
        recipes = plan.recipes()
        for spec in plan.makes:
            if recipes[spec].pictures.features not in kept:
                # Not before: the student whose tower makes them may come of an earlier run.
                with clock("features"):
                    keep_features(recipes[spec], recipes.values(), words)
                kept.add(recipes[spec].pictures.features)
            with clock(f"seed {plan.seed}: {spec}"):
                run(recipes[spec], directory=plan.places[spec])
        with clock(f"seed {plan.seed}: answers"):
            done.append(_asked(comparison, plan, recipes, asker, blind))
        for name in comparison.asked:
            if name not in facts:
                model, timed = plan.places[name] / "model", directory / "answering" / f"{name}.json"
                alone, precision = recipes[name].student.encoder_alone, recipes[name].machine.precision
                answering = None if alone else answering_of(model, timed, measure, precision)
                facts[name] = facts_of(model, plan.places[name], answering)
        results = Results(comparison, done, facts)
        results.print(console)
        results.write(directory, clock.seconds)
    console.print(f"report: {write_report(directory, samples=samples)}", highlight=False, soft_wrap=True)
    return results


class _Plan:
    """Where the runs of one seed lie, and which of them are made for it."""

    def __init__(self, comparison: Comparison, directory: Path, seed: int) -> None:
        self._comparison, self.seed = comparison, seed
        self.directory = directory / f"seed-{seed}"
        first = directory / "seed-0"
        self.places = {spec.name: (first if spec.once else self.directory) / spec.name for spec in comparison.runs}
        self.makes = [spec.name for spec in comparison.runs if seed == 0 or not spec.once]
        self._variables = {"COMPARISON": str(directory)}
        self._variables |= {spec.variable: str(self.places[spec.name] / "model") for spec in comparison.runs}

    def recipes(self) -> dict[str, Recipe]:
        """Every run's recipe, read anew: paths that are there by now are meant by them."""
        return {
            spec.name: load_recipe(
                spec.recipe, {**spec.set, "seed": 0 if spec.once else self.seed}, variables=self._variables
            )
            for spec in self._comparison.runs
        }


def _require_workflows(comparison: Comparison, recipes: Mapping[str, Recipe]) -> None:
    """A question set's workflow is one that students with adaptors will have, as far as their recipes tell."""
    for name, spec in comparison.questions.items():
        for run_name in comparison.asked:
            recipe = recipes[run_name]
            there = [stage.inserts.adaptor for stage in recipe.stages if stage.inserts is not None]
            if there and recipe.student.source is None and spec.workflow not in (None, TEXT, *there):
                raise RecipeError(
                    f"questions.{name}.workflow: '{spec.workflow}' is no adaptor of run '{run_name}': "
                    f"{nearest(str(spec.workflow), (TEXT, *there))}"
                )


def _asked(
    comparison: Comparison,
    plan: _Plan,
    recipes: Mapping[str, Recipe],
    asker: Asker,
    blind: Mapping[str, Mapping[str, Evaluation]],
) -> Seed:
    answers = plan.directory / "answers"
    rows: dict[str, dict[str, Evaluation]] = {name: dict(evaluations) for name, evaluations in blind.items()}
    for name, evaluations in blind.items():
        for who, evaluation in evaluations.items():
            evaluation.write(answers / name / f"{who}.jsonl")
    for run_name in comparison.asked:
        place = plan.places[run_name]
        if place.parent != plan.directory:  # made once: its answers are there already
            _copy_answers(place.parent / "answers", answers, run_name)
        for name, row in asker.ask(run_name, place, recipes[run_name], answers).items():
            rows[name][run_name] = row
    return Seed(plan.seed, rows, {name: plan.places[name] for name in plan.places})


def _check_asked(comparison: Comparison, recipes: Mapping[str, Recipe]) -> None:
    """Every set has somebody to answer it, and every run is asked something."""
    kinds = {name: recipes[name].student.encoder_alone for name in comparison.asked}
    for name, spec in comparison.questions.items():
        if spec.of_encoders not in kinds.values():
            which = "a vision encoder alone" if spec.of_encoders else "a model with a language model"
            raise RecipeError(f"questions.{name} ({spec.measure}) are for {which}, and no run that is asked makes one")
    for name, alone in kinds.items():
        if alone not in [spec.of_encoders for spec in comparison.questions.values()]:
            measures = "knn, probe, feature_error or feature_readout" if alone else "accurate or the like"
            raise RecipeError(
                f"run '{name}': no questions are for such a student: add some with 'measure: {measures}', or set "
                "'asked: false'"
            )


def _copy_answers(there: Path, here: Path, run_name: str) -> None:
    for file in there.glob(f"*/{run_name}.*"):
        write_whole(here / file.relative_to(there), file.read_bytes())


class Clock:
    """Says what is done and how long it took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        self._console.print(f"[bold]{step}[/]")
        started = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - started
        self._console.print(f"{step}: {self.seconds[step]:.0f} s", style="dim", highlight=False)
