"""Messages about recipes and comparisons that no other test meets."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilvlm.compare.schema import Comparison
from distilvlm.recipe import RecipeError, load_recipe
from distilvlm.recipe.dump import read_dump
from distilvlm.recipe.models import TeacherSpec
from distilvlm.recipe.schema import OptimSpec, StageSpec

PROJECTOR = {"name": "one", "train": ["projector"], "data": ["rows"], "optim": {"lr": 1, "batch": 1, "updates": 1}}


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("? [a, b]\n: 1", "a key must be a plain name"),
        ("extends: [a, b]", "extends: must be the path of one recipe file (here: ['a', 'b'])"),
        ("preset: x\npresets: [1]", "presets: must map a name to dotted fields with their values"),
        ("preset: 3\npresets: {x: {seed: 1}}", "preset: must be a name or a list of names (here: 3)"),
        ("seed: 2024-99-99", "a value in it can't be read: month must be in 1..12"),
        ("a: &a [*a]", "it is nested too deeply, or an alias (*name) stands inside of itself"),
        ("[" * 900, "it is nested too deeply, or an alias (*name) stands inside of itself"),
        ("seed: " + "9" * 5000, "a value in it can't be read: Exceeds the limit"),
        ("- 1", "must be a mapping of recipe sections"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path / "recipe.yaml", text)


def test_a_few_lines_that_stand_for_billions_of_values(tmp_path: Path) -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    told = refused(tmp_path / "recipe.yaml", f"a0: &a0 [x]\n{levels}")
    assert "its aliases (*name) stand for more than 100,000 values: write them out" in told


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read: .*Is a directory"):
        load_recipe(tmp_path)


def test_an_edited_dump() -> None:
    with pytest.raises(ValueError, match="not a dumped recipe: "):
        read_dump("[1")


def test_stages_that_contradict_themselves() -> None:
    with pytest.raises(ValueError, match="give exactly one of 'epochs' and 'updates'"):
        OptimSpec.model_validate({"lr": 1, "batch": 1})
    upcycle = {"do": "upcycle", "experts": 2, "top_k": 1}
    with pytest.raises(ValueError, match="upcycles twice: a sparse student cannot become sparse again"):
        StageSpec.model_validate({**PROJECTOR, "transform": [upcycle, upcycle]})
    with pytest.raises(ValueError, match="a remote teacher needs the address of its server"):
        TeacherSpec.model_validate({"from": "x", "kind": "remote"})


def test_names_and_terms_that_are_missing(tmp_path: Path) -> None:
    head = "name: x\nstudent: {from: y}\ndata: {rows: {path: rows.json}}\n"
    optim = "optim: {lr: 1, batch: 1, updates: 1}"
    stage = f"{{name: one, train: [projector], data: [rows], {optim}}}"
    assert "stage names must differ: ['one', 'one']" in refused(
        tmp_path / "recipe.yaml", f"{head}stages: [{stage}, {stage}]"
    )
    response = stage.replace("data:", "loss: {text: 1, response: 1}, data:")
    told = refused(tmp_path / "recipe.yaml", f"{head}stages: [{response}]")
    assert "stage 'one' has a teacher's loss term, but the recipe has no 'teacher'" in told


def test_runs_of_one_name() -> None:
    run = {"name": "a", "recipe": "r.yaml"}
    questions = {"q": {"title": "q", "path": "q.json", "training": "t.json"}}
    facts = {"name": "c", "title": "c", "runs": [run, run], "questions": questions}
    with pytest.raises(ValueError, match=r"names of runs must differ: \['a', 'a'\]"):
        Comparison.model_validate(facts)
