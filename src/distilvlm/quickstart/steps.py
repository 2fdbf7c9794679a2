"""What the quickstart does, step by step; each step that was finished is not done again."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files as package_files
from pathlib import Path

import torch
from rich.console import Console

from distilvlm.data import Source, read
from distilvlm.data.geometry import canvas, decode
from distilvlm.evaluate import Evaluation, evaluate, majority, question_only, questions_of, score
from distilvlm.models import build
from distilvlm.models.features import FeatureReader, FeatureStore
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.packaged import prepare
from distilvlm.models.save import load
from distilvlm.recipe import SourceSpec, load_recipe
from distilvlm.runs.execute import run

from . import questions
from .table import Comparison, print_table, write_table

logger = logging.getLogger(__name__)

RECIPES = ("base", "teacher", "control", "distilled")


def quickstart(directory: str | Path, seeds: int = 1) -> list[Comparison]:
    """Train and compare; prints the table and writes it to `table.md` and `table.json` in `directory`.

    The same call continues what was interrupted.
    """
    directory = Path(directory).absolute()
    console = Console()
    clock = Clock(console)
    with clock("data"):
        data = questions.write(directory / "data")
    with clock("encoder"):
        prepare(["dinov2-small"], directory / "weights")
    comparisons = []
    for seed in range(seeds):
        place = directory / f"seed-{seed}"
        write_recipes(place)
        if seed == 0:
            with clock("features"):
                keep_features(place, directory / "features", data)
        for name, recipe, overrides in (
            ("base-teacher", "base", ["preset=teacher"]),
            ("teacher", "teacher", []),
            ("base-student", "base", []),
            ("control", "control", []),
            ("distilled", "distilled", []),
        ):
            with clock(f"seed {seed}: {name}"):
                run(place / f"{recipe}.yaml", [*overrides, f"seed={seed}"], place / name)
        with clock(f"seed {seed}: answers"):
            comparisons.append(compare(place, directory / "features", data, seed))
        print_table(comparisons, console)
    write_table(comparisons, directory, clock.seconds)
    return comparisons


def write_recipes(place: Path) -> None:
    """Put the recipes where their relative paths lead to this quickstart's files, so that each can be run by hand."""
    place.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        source = package_files("distilvlm.quickstart") / f"{name}.yaml"
        (place / f"{name}.yaml").write_text(source.read_text())


def keep_features(place: Path, store: Path, data: questions.Files) -> None:
    """Run the frozen encoder over every picture, once for all runs."""
    recipe = load_recipe(place / "base.yaml")
    vlm = build(recipe.student, recipe.seed)
    if torch.cuda.is_available():
        vlm.to("cuda")
    geometry, size = recipe.pictures.geometry, vlm.layout.size
    features = FeatureStore(store, vlm.layout, fingerprint(vlm.model.model.vision_tower), geometry)
    features.fill(data.pictures, vlm, lambda path: canvas(decode(path), geometry, size), batch=32)


def compare(place: Path, store: Path, data: questions.Files, seed: int) -> Comparison:
    """Ask every official test question; all answers are written to `answers/`."""
    source = read(SourceSpec(path=str(data.test)), "test")
    asked = list(questions_of(source.records))
    pairs = questions.training_pairs()
    usual, blind = majority(answer for _, answer in pairs), question_only(pairs)
    rows = {
        "majority": score(asked, [usual for _ in asked], by_picture=True),
        "question-only": score(asked, [blind(question.text) for question in asked], by_picture=True),
    }
    parameters: dict[str, int] = {}
    for name in ("teacher", "control", "distilled"):
        rows[name], parameters[name] = _ask(place / name / "model", source, store, place / "answers" / f"{name}.jsonl")
    return Comparison(seed, rows, parameters)


def _ask(model: Path, source: Source, store: Path, out: Path) -> tuple[Evaluation, int]:
    vlm = load(model)
    if torch.cuda.is_available():
        vlm.to("cuda")
    language = sum(parameter.numel() for parameter in vlm.model.model.language_model.parameters())
    features = FeatureReader(store)
    evaluation = evaluate(
        vlm,
        source,
        "square",
        template="chat",
        batch_size=256,
        max_new_tokens=8,
        features=features,
        out=out,
        by_picture=True,
    )
    return evaluation, language


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
