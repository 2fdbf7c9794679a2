"""Every command that the documentation names exists as it is written there."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from distilvlm.cli import app
from distilvlm.recipe import load_recipe

from .pages import PAGES, ROOT, Command, blocks, commands, mentioned

COMMANDS = [command for page in PAGES for command in commands(page)]
# Programs of others that pages name, whose options are not ours to check.
OTHERS = {
    "source", "export", "openssl", "ssh", "curl", "vllm", "pip", "mkdir", "cd", "git", "npx", "llama-server", "docker",
    "lm_eval", "scontrol", "test", "exit",
}  # fmt: skip


@pytest.fixture(scope="module")
def group() -> Any:
    """The command line, none of whose commands does anything."""
    found = typer.main.get_command(app)
    for command in walk(found):
        command.callback = lambda **_: None
    return found


def walk(command: Any) -> Iterator[Any]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from walk(inner)


def refused(group: Any, arguments: tuple[str, ...]) -> str | None:
    """What the command line says against these arguments."""
    if "--help" in arguments:
        arguments = tuple(word for word in arguments if word != "--help")
        return None if reached(group, arguments) is not None else f"no such command: {' '.join(arguments)}"
    try:
        group.main(args=list(arguments), prog_name="distilvlm", standalone_mode=False)
    except Exception as error:
        return error.format_message() if hasattr(error, "format_message") else str(error)
    return None


def reached(group: Any, words: tuple[str, ...]) -> tuple[Any, tuple[str, ...]] | None:
    """The command that words lead to, and what is behind its name; None where a word is no command."""
    while hasattr(group, "commands") and words and not words[0].startswith("-"):
        if words[0] not in group.commands:
            return None
        group, words = group.commands[words[0]], words[1:]
    return group, words


def test_pages_have_commands() -> None:
    assert len([command for command in COMMANDS if command.arguments is not None]) > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_parsed(group: Any, page: Path) -> None:
    faults = [
        f"{command}\n    {fault}"
        for command in commands(page)
        if command.arguments is not None and (fault := refused(group, command.arguments))
    ]
    assert not faults, "\n".join(faults)


def test_a_wrong_option_command_or_choice_is_found(group: Any) -> None:
    assert "--dirr" in str(refused(group, ("run", "recipe.yaml", "--dirr", "x")))
    assert "runn" in str(refused(group, ("runn", "recipe.yaml")))
    assert refused(group, ("evaluate", "MODEL", "--data", "x.json", "--template", "vicunja"))
    assert "RECIPE" in str(refused(group, ("run", "--dir", "x"))).upper()
    assert refused(group, ("data", "--help")) is None and refused(group, ("dota", "--help"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_text_exist(group: Any, page: Path) -> None:
    for mention in mentioned(page):
        found = reached(group, mention.arguments or ())
        assert found is not None, f"{mention}: no such command"
        command, rest = found
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            assert not word.startswith("--") or word.split("=")[0] in {*known, "--help"}, f"{mention}: no {word}"


def test_recipes_that_commands_name_are_there_and_take_their_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    named = [command for command in COMMANDS if any(word.startswith("recipes/") for word in command.words)]
    assert named
    for command in named:
        for word in command.words:
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file(), str(command)
        if command.arguments is not None and command.arguments[0] in ("run", "plan", "doctor", "cache"):
            words = list(command.arguments)
            changes = [value for option, value in pairwise(words) if option == "--set"]
            load_recipe(words[1], changes)


def test_programs_are_known(group: Any) -> None:
    """Scripts and benchmarks are there with the options that are given; extras that pip is asked for exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in COMMANDS:
        program = command.words[0]
        if program.startswith("scripts/"):
            assert (ROOT / program).is_file(), str(command)
        elif program == "python":
            check_python(command)
        elif command.arguments is None:
            assert program in OTHERS, f"{command}: what is {program}? name it in OTHERS if it is another's"
    text = "\n".join(page.read_text() for page in PAGES)
    for asked in re.findall(r"pip install '?(?:distilvlm|\.)\[([\w,]+)\]", text):
        assert set(asked.split(",")) <= set(extras), asked


def test_job_scripts_are_bash_and_start_a_process_for_every_gpu() -> None:
    scripts = [block for page in PAGES for block in blocks(page) if block.text.startswith("#!/bin/bash")]
    several = [script for script in scripts if "torchrun" in script.text]
    assert several
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script.text, text=True, check=True)
    for script in several:
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.text, re.MULTILINE))
        assert f"--nproc-per-node {asked['gpus-per-node']} " in script.text and asked["ntasks-per-node"] == "1"


def test_every_extra_is_told_of_once() -> None:
    table = (ROOT / "docs/index.md").read_text().split("| extra | for |")[1].split("\n\n")[0]
    told = [name for line in table.split("\n|")[2:] for name in re.findall(r"`(\w+)`", line.split("|")[0])]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(told) == sorted(set(extras) - {"dev"})


def check_python(command: Command) -> None:
    if command.words[1] == "-m":
        return
    script = ROOT / command.words[1]
    assert script.is_file(), str(command)
    source = script.read_text()
    for word in command.words[2:]:
        assert not word.startswith("--") or f'"{word}"' in source, f"{command}: no {word}"


def test_benchmarks_in_the_text_are_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`python (benchmarks/\w+\.py)", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_commands_stand_in_blocks_that_are_read() -> None:
    """A command in a block of another kind would be checked by nobody."""
    for page in PAGES:
        for block in blocks(page):
            assert block.language, f"{block.page}:{block.line}: a block without a language"
            hidden = block.language not in ("bash", "console") and re.search(
                r"^\$ |^distilvlm \w", block.text, re.MULTILINE
            )
            generated = block.page == "docs/reference/commands.md"
            assert not hidden or generated, f"{block.page}:{block.line}: commands in a block of {block.language}"
