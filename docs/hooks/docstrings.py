"""Docstrings as pages: what is told of a parameter, `name, name: what it is`, becomes an item of a list there."""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)$")
SHARED = re.compile(r"^(    )(\w+(?:, \w+)+): ", re.MULTILINE)
"""Of an `Args:` section: parameters that are told together, for which its parser has no form."""


class Parameters(griffe.Extension):
    """Runs over every object once the package is read."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            known = {parameter.name for parameter in func.parameters}
            func.docstring.value = apart(listed(func.docstring.value, known), known)


def listed(text: str, parameters: set[str]) -> str:
    """`text` with a list item for every line that begins with parameters' names, and what is indented behind it."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        item = ITEM.match(line)
        if item and {name.strip("* ") for name in item[1].split(",")} <= parameters:
            lines += [] if inside else [""]
            lines.append(f"* `{item[1]}`: {item[2]}")
            inside = True
        else:
            if inside and line and not line.startswith(" "):
                lines.append("")  # a paragraph behind the list is not of its last item
                inside = False
            lines.append(line)
    return "\n".join(lines)


def apart(text: str, parameters: set[str]) -> str:
    """`text` in which each parameter of an `Args:` section has an item; what is told of several stands last."""

    def told(match: re.Match[str]) -> str:
        names = match[2].split(", ")
        if not set(names) <= parameters:
            return match[0]
        together = "".join(f"{match[1]}{name}: see `{names[-1]}`.\n" for name in names[:-1])
        return f"{together}{match[1]}{names[-1]}: "

    return SHARED.sub(told, text)
