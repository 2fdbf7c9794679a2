"""The command line as a page, made of the commands themselves when the site is built.

A page says `<!-- every command -->` where it belongs.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer

MARKER = "<!-- every command -->"
WORDS = {str: "text", int: "whole number", float: "number", Path: "path"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARKER, reference()) if MARKER in markdown else markdown


def reference() -> str:
    from distilvlm.cli import app

    return "\n\n".join(section(names, command) for names, command in commands(typer.main.get_command(app), "distilvlm"))


def commands(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that call it; groups of commands in their order."""
    for name, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from commands(inner, *names, name)
        elif not inner.hidden:
            yield (*names, name), inner


def section(names: tuple[str, ...], command: Any) -> str:
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    usage = " ".join([*names, *(called(argument) for argument in arguments), "[OPTIONS]"])
    lines = [f"## {' '.join(names[1:])} {{ #{'-'.join(names[1:])} }}", "", *help_of(command), ""]
    lines += ["```text", usage, "```", "", "| | value | default | |", "|---|---|---|---|"]
    kinds = typing.get_type_hints(inspect.unwrap(command.callback))
    return "\n".join([*lines, *(row(parameter, kinds[parameter.name]) for parameter in shown)])


def help_of(command: Any) -> list[str]:
    return inspect.cleandoc(command.help or "").split("\n")


def called(argument: Any) -> str:
    word = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return word if argument.required else f"[{word}]"


def row(parameter: Any, kind: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    names = [called(parameter)] if is_argument else [*parameter.opts, *parameter.secondary_opts]
    default = "**required**" if parameter.required else told(parameter.default)
    meaning = (parameter.help or "").replace("|", "\\|")
    return f"| {' '.join(f'`{name}`' for name in names)} | {value(kind)} | {default} | {meaning} |"


def told(default: Any) -> str:
    if default in (None, False, ()) or default == []:
        return "–"
    return "yes" if default is True else f"`{default}`"


def value(kind: Any) -> str:
    origin, inner = get_origin(kind), [argument for argument in get_args(kind) if argument is not type(None)]
    if origin is Literal:
        return " · ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(map(value, inner))
    if origin is list:
        return f"{value(inner[0])}, repeated"
    if origin is tuple:
        return f"{len(inner)} × {value(inner[0])}"
    return "" if kind is bool else WORDS[kind]
