"""What the site is made of beside its pages: fields, commands and docstrings that are written when it is built."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel, Field

from distilvlm.cli import app
from distilvlm.recipe import Recipe

from .pages import ROOT

HOOKS = ROOT / "docs" / "hooks"


def hook(name: str) -> ModuleType:
    if name in ("docstrings", "repository"):
        pytest.importorskip("mkdocs", reason="the site's builder is not installed: pip install '.[docs]'")
    spec = importlib.util.spec_from_file_location(f"docs_hooks_{name}", HOOKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rates(BaseModel):
    """How fast."""

    lr: float = Field(gt=0, lt=1, description="the rate")


class File(BaseModel):
    """A file."""

    source: str | None = Field(default=None, alias="from", description="this | that")
    kinds: list[int] = [1, 2]
    optim: Rates = Rates(lr=0.1)
    stages: dict[str, Rates] = Field(default={})


def test_a_table_tells_names_values_and_defaults() -> None:
    written = hook("fields").tables(File)
    assert "| `from` | text | – | this \\| that |" in written
    assert "| `kinds` | list of whole number | `[1, 2]` |  |" in written
    assert "| `optim` | [section](#file-rates) | its defaults |  |" in written
    assert "### `optim` · `stages.NAME` { #file-rates }\n\nHow fast." in written
    assert "| `lr` | number > 0 < 1 | **required** | the rate |" in written


def test_every_field_of_the_schema_is_told_once() -> None:
    fields = hook("fields")
    written = fields.on_page_markdown((ROOT / "docs/reference/fields.md").read_text())
    assert "<!--" not in written
    recipe = written.split("## A recipe")[1].split("## A comparison")[0]
    sections = {section for section, _ in fields.sections(Recipe, "")}
    rows = sum(len(section.model_fields) for section in sections)
    assert len(re.findall(r"^\| `[^`]+` \|", recipe, re.MULTILINE)) == rows
    assert len(set(re.findall(r"\(#([\w-]+)\)", recipe)) - set(re.findall(r"\{ #([\w-]+) \}", recipe))) == 0


def test_every_option_of_every_command_is_told() -> None:
    written = hook("commands").on_page_markdown((ROOT / "docs/reference/commands.md").read_text())

    def options(command: Any) -> list[str]:
        inner = getattr(command, "commands", {}).values()
        own = [] if inner else [option for parameter in command.params for option in parameter.opts]
        return [*own, *(option for one in inner for option in options(one))]

    for option in options(typer.main.get_command(app)):
        assert f"`{option}`" in written or f"{option.upper()}" in written, option
    assert "## data convert folders { #data-convert-folders }" in written


def test_links_that_leave_the_pages_lead_to_files_that_are_shown() -> None:
    repository = hook("repository")
    text = "[a](../recipes/iaa.yaml), [b](sparse.md), [c](../../src/x.py), [d](../data.md#boxes)"
    page = SimpleNamespace(file=SimpleNamespace(src_uri="reference/fields.md"))
    led = repository.on_page_markdown(text, page)
    assert led == "[a](../recipes/iaa.yaml), [b](sparse.md), [c](../files/src/x.py.md), [d](../data.md#boxes)"
    page.file.src_uri = "index.md"
    assert repository.on_page_markdown("[a](../recipes/iaa.yaml)", page) == "[a](files/recipes/iaa.yaml.md)"


def test_links_of_pages_and_readme_lead_somewhere_in_the_repository() -> None:
    """The site's own links are checked when it is built; these are the ones that a reader of the repository follows."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("text", "suffix", "found"),
    [
        ('<script src="https://cdn.example/x.js">', ".html", ["https://cdn.example/x.js"]),
        ('<link href="//fonts.example/a.css" rel="stylesheet">', ".html", ["//fonts.example/a.css"]),
        ('<img alt="" src="https://x.example/a.png">', ".html", ["https://x.example/a.png"]),
        ('<a href="https://arxiv.org/abs/2410.16236">', ".html", []),
        ('<link rel="canonical" href="https://x.example/">', ".html", []),
        ('<script src="assets/bundle.js">', ".html", []),
        ('<pre class="mermaid"><code>', ".html", ["mermaid"]),
        ("@import url(https://fonts.example/a.css)", ".css", ["https://fonts.example/a.css"]),
        ("@import '//fonts.example/a.css'", ".css", ["//fonts.example/a.css"]),
        ("a { background: url(a.png) }", ".css", []),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(text: str, suffix: str, found: list[str]) -> None:
    assert list(hook("local").elsewhere(text, suffix)) == found


def test_told_parameters_become_lists() -> None:
    docstrings = hook("docstrings")
    text = "What it does.\n\na, b: two numbers,\n    added.\nother: not one of its own.\n\nRaises `X`."
    assert docstrings.listed(text, {"a", "b"}) == (
        "What it does.\n\n\n* `a, b`: two numbers,\n    added.\n\nother: not one of its own.\n\nRaises `X`."
    )
    section = "Args:\n    a, b: two numbers.\n    c, d: not its own."
    assert docstrings.apart(section, {"a", "b", "c"}) == (
        "Args:\n    a: see `b`.\n    b: two numbers.\n    c, d: not its own."
    )


@pytest.mark.parametrize("page", sorted((ROOT / "docs/reference/api").glob("*.md")), ids=lambda page: page.stem)
def test_functions_with_a_module_of_their_name_are_told_of(page: Path) -> None:
    """`distilvlm.losses.relation` is a module to who reads the source; the function is asked for by its whole name."""
    public = getattr(importlib.import_module(f"distilvlm.{page.stem}"), "__all__", [])
    for name in public:
        if (ROOT / "src/distilvlm" / page.stem / f"{name}.py").exists():
            assert f"::: distilvlm.{page.stem}.{name}.{name}\n" in page.read_text(), name


def test_every_page_is_in_the_navigation_and_every_hook_is_run() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)]

    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(pages(config["nav"])) == there
    extension = config["plugins"][1]["mkdocstrings"]["handlers"]["python"]["options"]["extensions"][0]
    assert {*config["hooks"], extension.partition(":")[0]} == {
        str(p.relative_to(ROOT)) for p in Path(HOOKS).glob("*.py")
    }
