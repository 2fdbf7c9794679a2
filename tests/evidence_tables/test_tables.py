"""The evidence tables: their files and recipes load, and every claim is one that its table can decide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageColor

from distilvlm.compare import Comparison, load_comparison
from distilvlm.data.convert import convert
from distilvlm.recipe import Recipe, load_recipe
from evidence import scenes
from evidence.results import MEASURES
from evidence.tables import ROOT, TABLES, Table

OWN = [table for table in TABLES.values() if table.file.parent.name == "evidence"]


@pytest.fixture
def loaded(tmp_path: Path) -> dict[str, tuple[Comparison, dict[str, Recipe]]]:
    return {table.name: recipes_of(table, tmp_path) for table in OWN}


def recipes_of(table: Table, directory: Path) -> tuple[Comparison, dict[str, Recipe]]:
    comparison = load_comparison(table.file, directory)
    places = {spec.variable: str(directory / spec.name) for spec in comparison.runs}
    variables = {"COMPARISON": str(directory), **places}
    return comparison, {
        spec.name: load_recipe(spec.recipe, {**spec.set, "seed": 1}, variables=variables) for spec in comparison.runs
    }


@pytest.mark.parametrize("table", OWN, ids=lambda table: table.name)
def test_every_run_has_a_recipe_and_starts_from_an_earlier_one(table: Table, tmp_path: Path) -> None:
    comparison, recipes = recipes_of(table, tmp_path)
    earlier: set[str] = set()
    for spec in comparison.runs:
        recipe = recipes[spec.name]
        used = [recipe.student.source, recipe.teacher and recipe.teacher.source]
        made_here = {Path(source).name for source in used if source is not None}
        assert made_here <= earlier, spec.name
        earlier.add(spec.name)


def test_rows_of_llava_kd_differ_in_what_they_are_named_after_only(loaded: dict) -> None:
    _, recipes = loaded["llava-kd"]
    start = recipes["dpt-sft-sft"]
    alike = {"loss": True, "name": True}
    for name in ("dpt-sft-dft", "response-alone", "visual-alone", "no-relation", "doubled-loss"):
        assert recipes[name].student == start.student and recipes[name].data == start.data
        (one,), (other,) = recipes[name].stages, start.stages
        assert one.model_dump(exclude=alike) == other.model_dump(exclude=alike), name
    weights = {
        name: tuple(getattr(recipes[name].stages[0].loss, term) for term in ("response", "visual", "relation"))
        for name in recipes
    }
    assert weights["dpt-sft-dft"] == (1, 1, 0.5) and weights["dpt-sft-sft"] == (0, 0, 0)
    assert weights["relation-alone"] == (0, 0, 0.5) and weights["no-response"] == (0, 1, 0.5)
    assert recipes["doubled-rate"].stages[0].optim.lr == 2 * start.stages[0].optim.lr
    assert recipes["doubled-loss"].stages[0].loss.text == 2


@pytest.mark.parametrize(
    "rows",
    [
        ("first-sft", "control"),
        ("encoder-sft", "move-kd"),
        ("dpt-sft", "llava-kd"),
        ("d2d", "d2s", "llava-mod"),
        ("first-adaptor", "iaa"),
        ("one-stage-second", "iaa-one-stage"),
        ("all-d2d", "all-d2s", "combined"),
    ],
    ids=lambda rows: rows[-1],
)
def test_every_combined_row_makes_as_many_updates_behind_its_alignment(loaded: dict, rows: tuple[str, ...]) -> None:
    _, recipes = loaded["combined"]
    assert sum(stage.optim.updates for name in rows for stage in recipes[name].stages) == 80


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_every_claim_can_be_decided(table: Table, tmp_path: Path) -> None:
    comparison = load_comparison(table.file, tmp_path)
    assert table.claims
    for claim in table.claims:
        assert claim.rows in comparison.differences, claim.says
        figures = MEASURES[comparison.questions[claim.questions].measure].figures
        assert claim.figure in [figure.name for figure in figures if figure.headline], claim.says
        assert claim.source in ("paper", "control", "ours")


def test_pictures_show_what_their_labels_say(tmp_path: Path) -> None:
    scenes.write(tmp_path, {"train": 6, "test": 3})
    made = convert("yolo", tmp_path / "config.yaml", tmp_path / "boxes.jsonl", split="test", task="grounding")
    assert made.rows == made.pictures == 3 and not made.bad
    for file in (tmp_path / "labels/train").iterdir():
        kind, x, y, width, height = file.read_text().split()
        picture = Image.open(tmp_path / "images/train" / f"{file.stem}.png")
        left, top = (round((float(at) - float(size) / 2) * 64) for at, size in ((x, width), (y, height)))
        outside = picture.getpixel((left - 1, top - 1))
        middle = picture.getpixel((round(float(x) * 64), round(float(y) * 64)))
        assert outside == picture.getpixel((0, 0))
        assert middle == ImageColor.getrgb(scenes.NAMES[int(kind)].split()[0])
    text = (tmp_path / "text.json").read_text()
    assert "<image>" not in text and "There is a" in text
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert pairs and all(pair["chosen"][1] != pair["rejected"][1] for pair in pairs)
    assert {pair["chosen"][0]["value"] for pair in pairs} == {"<image>\nDescribe this picture."}


def test_scripts_name_the_tables() -> None:
    assert set(yaml.safe_load((ROOT / "evidence/claims.yaml").read_text())) == set(TABLES)
