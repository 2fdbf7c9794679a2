"""What a user hears when a recipe is wrong: the file, the dotted field, what is known there, and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from distilvlm.recipe.schema import Recipe
from distilvlm.recipe.tree import is_list, is_mapping

Step = str | int
COMPOSING_KEYS = ("extends", "presets", "preset")
"""Top-level keys of a file that are consumed while it is composed; the schema never sees them."""


class RecipeError(ValueError):
    """A recipe that cannot be used; one line per problem, each naming the file and the dotted field."""


@dataclass(frozen=True)
class Layer:
    """One thing that contributed to a recipe: a file, a preset or an override."""

    origin: str
    tree: Mapping[str, Any]
    whole: bool = False  # a file, not a single assignment


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else "there are none"


def explain(
    error: ValidationError, tree: Mapping[str, Any], layers: Sequence[Layer], schema: type[BaseModel] = Recipe
) -> RecipeError:
    """Say in the file's words what the schema refused. `layers` stand in the order in which they were applied."""
    lines: list[str] = []
    for problem in error.errors():
        field = named(problem["loc"], tree)
        place = ".".join(map(str, field)) or schema.__name__.lower()
        line = f"{_origin(problem, field, layers)}: {place}: {_message(problem, schema)}"
        if line not in lines:
            lines.append(line)
    return RecipeError("\n".join(lines))


def named(path: Iterable[Step], tree: Any) -> tuple[str, ...]:
    """A schema location as the user writes it: stages by name, without the schema's own markers of unions."""
    steps: list[str] = []
    here = tree
    for step in path:
        if is_list(here) and isinstance(step, int) and step < len(here):
            here = here[step]
            name = here.get("name") if is_mapping(here) else None
            steps.append(name if isinstance(name, str) else str(step))
        elif is_mapping(here) and step in here:
            here = here[step]
            steps.append(str(step))
        elif is_mapping(here) and step != here.get("do"):
            steps.append(str(step))  # a field that is missing
            here = None
    return tuple(steps)


def _message(problem: ErrorDetails, schema: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        location = problem["loc"]
        return f"unknown key; {nearest(str(location[-1]), _known_keys(location[:-1], schema))}"
    if problem["type"] == "missing":
        return "missing; this field has no default"
    text = problem["msg"].removeprefix("Value error, ")
    shown = problem["input"]
    plain = isinstance(shown, (str, int, float, bool)) or shown is None
    return f"{text[0].lower()}{text[1:]}{f' (here: {shown!r})' if plain else ''}"


def _origin(problem: ErrorDetails, field: Sequence[str], layers: Sequence[Layer]) -> str:
    """The layer that wrote the field; of several, the one that had the last word."""
    best, depth = layers[-1].origin, 0
    for layer in layers:
        reached = _depth(layer.tree, field)
        if reached > 0 and reached >= depth:
            best, depth = layer.origin, reached
    if depth:
        return best
    return next(layer.origin for layer in reversed(layers) if layer.whole)


def _depth(tree: Any, field: Sequence[str]) -> int:
    """How many steps of `field` the tree holds."""
    for count, step in enumerate(field):
        if is_mapping(tree) and step in tree:
            tree = tree[step]
        elif is_list(tree):
            found = [e for i, e in enumerate(tree) if str(i) == step or (is_mapping(e) and e.get("name") == step)]
            if not found:
                return count
            tree = found[0]
        else:
            return count
    return len(field)


def _known_keys(location: Iterable[Step], schema: type[BaseModel]) -> list[str]:
    """Keys that the schema has at a location (pydantic's, with its union markers)."""
    annotation: Any = schema
    for step in location:
        annotation = _inside(annotation, step)
    models = _models(annotation)
    keys = [field.alias or name for model in models for name, field in model.model_fields.items()]
    return [*keys, *COMPOSING_KEYS] if models == [Recipe] else keys


def _inside(annotation: Any, step: Step) -> Any:
    models = _models(annotation)
    if models:
        for model in models:
            if _tag(model) == step:
                return model
            for name, field in model.model_fields.items():
                if step in (name, field.alias):
                    return field.annotation
        return None
    for form in _alternatives(annotation):
        if get_origin(form) in (list, dict):
            return get_args(form)[-1]
    return None


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [a for a in _alternatives(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, with `Annotated` and `None` taken off."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (list, dict, Literal) or not get_args(annotation):
        return [annotation]
    return [form for member in get_args(annotation) for form in _alternatives(member)]


def _tag(model: type[BaseModel]) -> str | None:
    field: FieldInfo | None = model.model_fields.get("do")
    return None if field is None else get_args(field.annotation)[0]
