"""YAML and Python of the pages are true: recipes load, the example of a loss is right."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from distilvlm.compare import load_comparison
from distilvlm.evaluate.suites.own import SuiteFile
from distilvlm.recipe import Recipe, Section, StageSpec, load_recipe

from .pages import PAGES, ROOT, Block, blocks

ALL = [block for page in PAGES for block in blocks(page)]
YAML = [block for block in ALL if block.language == "yaml"]
NAMED = re.compile(r"^# (\w+\.yaml)\n")


@pytest.fixture
def explained(tmp_path: Path) -> dict[str, Recipe]:
    """The recipes of the page that explains them."""
    written = [
        (found[1], block) for block in YAML if block.page == "docs/recipe.md" and (found := NAMED.match(block.text))
    ]
    for name, block in written:
        (tmp_path / name).write_text(block.text)
    return {name: load_recipe(tmp_path / name) for name, _ in written}


def sections(value: Any) -> set[type[Section]]:
    """The classes of all sections in a value."""
    if isinstance(value, Section):
        return {type(value)}.union(*(sections(getattr(value, name)) for name in type(value).model_fields))
    if isinstance(value, dict):
        return set().union(*map(sections, value.values()))
    return set().union(*map(sections, value)) if isinstance(value, (list, tuple)) else set()


def kinds(section: type[BaseModel]) -> set[type[BaseModel]]:
    """The section and all that its fields may hold."""
    found = {section}
    for field in section.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            form = waiting.pop()
            if isinstance(form, type) and issubclass(form, BaseModel):
                found |= kinds(form)
            waiting += getattr(form, "__args__", ())
    return found


def test_the_explained_recipes_show_every_section_of_the_schema(explained: dict[str, Recipe]) -> None:
    shown = set().union(*map(sections, explained.values()))
    assert kinds(Recipe) - shown == set()


def test_presets_of_the_explained_recipe_work(explained: dict[str, Recipe], tmp_path: Path) -> None:
    whole = tmp_path / "whole.yaml"
    assert load_recipe(whole, ["preset=small,dpo"]).stages[-1].loss.preference_kind == "dpo"
    assert explained["elsewhere.yaml"].stages == explained["whole.yaml"].stages


def kind(block: Block) -> str:
    """What a YAML block is: a recipe, a comparison, a test set, or some sections of one of the first two."""
    keys = (yaml.safe_load(block.text) or {}).keys()
    if "stages" in keys and "student" in keys:
        return "recipe" if {"name", "data"} <= keys else "sections"
    if "reader" in keys:
        return "suite"
    return "comparison" if {"runs", "questions"} <= keys else "sections"


@pytest.mark.parametrize("block", YAML, ids=lambda block: f"{Path(block.page).stem}:{block.line}")
def test_yaml_of_pages_is_taken(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files load, and pieces are what the schema has at their place."""
    monkeypatch.chdir(ROOT)
    for variable in re.findall(r"\$\{(\w+)\}", block.text):
        monkeypatch.setenv(variable, "somewhere")
    file = tmp_path / "page.yaml"
    file.write_text(block.text)
    tree = yaml.safe_load(block.text)
    match kind(block):
        case "recipe":
            load_recipe(file)
        case "suite":
            SuiteFile.model_validate(tree)
        case "comparison":
            load_comparison(file, tmp_path)
        case _ if {"questions", "differences", "prepare"} & tree.keys():
            known = (
                "name: x\ntitle: x\nruns: [{name: control, recipe: ./c.yaml}, {name: distilled, recipe: ./d.yaml}]\n"
            )
            file.write_text(known + block.text)
            load_comparison(file, tmp_path)
        case _ if "extends" in tree:
            if block.page != "docs/recipe.md":  # these are loaded together
                (tmp_path / "recipes").symlink_to(ROOT / "recipes")
                load_recipe(file)
        case _:
            for key, value in tree.items():
                owner = next((kind for kind in (Recipe, StageSpec) if key in kind.model_fields), None)
                assert owner is not None, f"neither a recipe nor a stage has '{key}'"
                TypeAdapter(owner.model_fields[key].annotation).validate_python(value)


def test_the_example_of_a_divergence_is_its_formula() -> None:
    source = next(b.text for b in ALL if b.page == "docs/add-a-method.md" and b.language == "python")
    names: dict[str, Any] = {"Tensor": Tensor}
    exec(source, names)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    student.requires_grad_()
    value, gradient = names["squared_hellinger"](student.detach().log_softmax(-1), teacher.log_softmax(-1))
    expected = 1 - (student.softmax(-1) * teacher.softmax(-1)).sqrt().sum(-1)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0])
    same, flat = names["squared_hellinger"](teacher.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(same, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(flat, torch.zeros(3, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    "block",
    [block for block in ALL if block.language == "python"],
    ids=lambda block: f"{Path(block.page).stem}:{block.line}",
)
def test_python_of_pages_imports_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distilvlm"):
            names: dict[str, Any] = {}
            exec(f"from {node.module} import {', '.join(alias.name for alias in node.names)}", names)
