"""The messages that the package raises, and whether a test meets them: read from the source, nothing is run.

A message's template is its text with a gap where a value stands. `docs/errors.md` names each once, a value in ‹›.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .pages import ROOT

SOURCE = ROOT / "src" / "distilvlm"
GAP = "‹›"
VALUE = re.compile("‹[^‹›]*›")

PROGRAMMING = {"AttributeError", "IndexError", "NotImplementedError", "KeyError", "TypeError", "AssertionError"}
"""What only code can run into. Beside these a raise needs no entry where its class is private (control flow), or where
it has no words of its own but passes on another error's."""

FEWEST = 8
"""Letters from which a template says something by itself, if they are words and no field's name."""


@dataclass(frozen=True)
class Raised:
    """One `raise` with words of its own."""

    place: str
    room: str
    kind: str
    template: str  # gaps with the name of what stands there: ‹path›
    known: str  # gaps without


@functools.cache
def raised() -> tuple[Raised, ...]:
    return tuple(found for path in sorted(SOURCE.rglob("*.py")) for found in _raised_in(path))


@functools.cache
def texts() -> frozenset[str]:
    """Templates of every text of the source, raised or not: messages that reach a user on another way."""
    return frozenset(
        bare(template(node))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(_tree(path))
        if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp))
    )


def bare(text: str) -> str:
    """A template without the names of its gaps, and without what is layout."""
    return re.sub(r"\s+", " ", re.sub(f"({GAP})+", GAP, VALUE.sub(GAP, text))).strip()


def says_something(text: str) -> bool:
    words = VALUE.sub("", text).strip()
    return " " in words and len(re.sub(r"\W", "", words)) >= FEWEST


def template(node: ast.AST) -> str:
    """The text of an expression, with gaps."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else f"‹{node.value}›"
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    if isinstance(node, ast.FormattedValue):
        return f"‹{_named(node.value)}›"
    return f"‹{_named(node)}›"


def _named(node: ast.AST) -> str:
    """What a reader may call a value: the name nearest to it."""
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    if isinstance(node, ast.Subscript):
        return _named(node.value)
    if isinstance(node, ast.Call):
        function = _named(node.func)
        if function in ("join", "sorted", "list", "len", "type", "str", "int", "max", "min", "kind") and node.args:
            return {"len": "number", "type": "kind", "kind": "kind"}.get(function) or _named(node.args[0])
        return function
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return _named(node.generators[0].iter)
    return "..."


def _raised_in(path: Path) -> Iterator[Raised]:
    tree = _tree(path)
    for function, node in _raises(tree, tree):
        if not isinstance(node.exc, ast.Call):
            continue
        kind = ast.unparse(node.exc.func).rpartition(".")[2]
        if kind in PROGRAMMING or kind.startswith("_") or kind[0].islower():
            continue
        found = [_worded(function, argument) for argument in node.exc.args]
        text = max(found, key=lambda one: len(VALUE.sub("", one)), default="")
        if says_something(text):
            inside = path.relative_to(SOURCE)
            yield Raised(
                f"{inside}:{node.lineno}", inside.parts[0], kind, re.sub(r"\s+", " ", text).strip(), bare(text)
            )


def _worded(function: ast.AST, argument: ast.expr) -> str:
    """An argument's template; of a variable, that of the text that the function put into it."""
    if isinstance(argument, ast.Name):
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and any(_is(target, argument.id) for target in node.targets):
                return template(node.value)
    return template(argument)


def _is(target: ast.expr, name: str) -> bool:
    return isinstance(target, ast.Name) and target.id == name


def _raises(node: ast.AST, function: ast.AST) -> Iterator[tuple[ast.AST, ast.Raise]]:
    for child in ast.iter_child_nodes(node):
        inner = child if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(child, ast.Raise):
            yield function, child
        yield from _raises(child, inner)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
