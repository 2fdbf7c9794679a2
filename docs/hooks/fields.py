"""Every field of a recipe, written into a page when the site is built: out of the schema itself, never by hand.

A page says `<!-- fields of distilvlm.recipe.Recipe -->` where the tables belong.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

MARKER = re.compile(r"<!-- fields of ([\w.]+)\.(\w+) -->")
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    return MARKER.sub(lambda match: tables(getattr(importlib.import_module(match[1]), match[2])), markdown)


def tables(schema: type[BaseModel]) -> str:
    """A heading, the docstring and a table of fields for the schema and every section under it, each once."""
    places: dict[type[BaseModel], list[str]] = {}
    for section, place in sections(schema, ""):
        places.setdefault(section, []).append(place)
    return "\n\n".join(table(section, found, schema) for section, found in places.items())


def sections(section: type[BaseModel], place: str) -> Iterator[tuple[type[BaseModel], str]]:
    """Each section with its dotted place, `stages.NAME.optim`, in the order of the file."""
    yield section, place
    for key, field in fields(section):
        for inner, below in inside(field.annotation):
            yield from sections(inner, ".".join(filter(None, (place, key, *below))))


def inside(annotation: Any, below: tuple[str, ...] = ()) -> Iterator[tuple[type[BaseModel], tuple[str, ...]]]:
    """The sections that a field's type holds. In a list or mapping they have names; a transform has what it does."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        do = annotation.model_fields.get("do")
        yield annotation, (get_args(do.annotation)[0],) if do else below
        return
    named = (*below, "NAME") if get_origin(annotation) in (list, dict) else below
    for argument in get_args(annotation):
        yield from inside(argument, named)


def fields(section: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """Fields by the names that a file has."""
    return [(field.alias or name, field) for name, field in section.model_fields.items()]


def table(section: type[BaseModel], places: list[str], schema: type[BaseModel]) -> str:
    heading = " · ".join(f"`{place}`" for place in places) if places != [""] else "The file"
    lines = [f"### {heading} {{ #{anchor(section, schema)} }}", "", inspect.cleandoc(section.__doc__ or ""), ""]
    lines += ["| field | value | default | what it is |", "|---|---|---|---|"]
    for key, field in fields(section):
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{key}` | {value(field, schema)} | {default(field)} | {meaning} |")
    return "\n".join(lines)


def anchor(section: type[BaseModel], schema: type[BaseModel]) -> str:
    return f"{schema.__name__}-{section.__name__}".lower()


def value(field: FieldInfo, schema: type[BaseModel]) -> str:
    """What may stand there: `number > 0`, a choice, or a link to the section that it is."""
    bounds = [f"{sign} {limit:g}" for name, sign in BOUNDS.items() for limit in limits(field, name)]
    return " ".join([told(field.annotation, schema), *bounds])


def limits(field: FieldInfo, name: str) -> list[float]:
    return [getattr(rule, name) for rule in field.metadata if hasattr(rule, name)]


def told(annotation: Any, schema: type[BaseModel]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return told(arguments[0], schema)
    if origin is Literal:
        return " · ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(told(argument, schema) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"list of {told(arguments[0], schema)}"
    if origin is tuple:
        return f"{len(arguments)} × {told(arguments[0], schema)}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"by name: {told(arguments[1], schema)}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"[section](#{anchor(annotation, schema)})"
    return WORDS[annotation]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    found = field.get_default(call_default_factory=True)
    if found is None or found is PydanticUndefined:
        return "–"
    if isinstance(found, BaseModel):
        return "its defaults"
    found = list(found) if isinstance(found, tuple) else found
    return "`" + yaml.safe_dump(found, default_flow_style=True).removesuffix("...\n").strip() + "`"
