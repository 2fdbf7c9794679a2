"""Laying one recipe over another: deep merging of mappings, stages by name, and single dotted assignments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from distilvlm.recipe.errors import RecipeError, nearest
from distilvlm.recipe.tree import is_list, is_mapping

VERBATIM = "config"
"""Architectures are handed to transformers as they stand: inside them null is a value, not 'take back'."""


def merge(base: Mapping[str, Any], change: Mapping[str, Any], *, verbatim: bool = False) -> dict[str, Any]:
    """`change` over `base`; neither is altered.

    Mappings merge deep. null takes back what the base said, so that the schema's default holds again. Lists replace,
    except `stages`: entries that all have names of the base's stages change those and leave the others in place.
    """
    merged = deepcopy(dict(base))
    for key, value in change.items():
        inherited = merged.get(key)
        if value is None and key in merged and not verbatim:
            del merged[key]
        elif is_mapping(value) and is_mapping(inherited):
            merged[key] = merge(inherited, value, verbatim=verbatim or key == VERBATIM)
        elif key == "stages" and not verbatim and is_list(value) and is_list(inherited):
            merged[key] = _merge_stages(inherited, value)
        else:
            merged[key] = deepcopy(value)
    return merged


def _merge_stages(base: list[Any], change: list[Any]) -> list[Any]:
    changes = {_name(entry): entry for entry in change}
    if None in changes or len(changes) < len(change) or not set(changes) <= {_name(entry) for entry in base}:
        return deepcopy(change)
    return [merge(entry, changes[_name(entry)]) if _name(entry) in changes else entry for entry in base]


def _name(entry: Any) -> str | None:
    name = entry.get("name") if is_mapping(entry) else None
    return name if isinstance(name, str) else None


def assign(tree: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    """Set one field of `tree` in place. Entries of a list are meant by index or by name (`stages.dpt.optim.lr`).

    A mapping laid over a mapping merges, as in `merge`; sections that are not there yet are made.
    Raises `RecipeError` that begins with `origin` when a step of the way does not exist.
    """
    *way, last = dotted.split(".")
    if not all([*way, last]):
        raise RecipeError(f"{origin}: '{dotted}' has an empty step; write e.g. stages.0.optim.lr")
    here: Any = tree
    for count, step in enumerate(way):
        place = ".".join(way[:count])
        if is_list(here):
            here = here[_position(here, step, place, origin)]
        elif is_mapping(here):
            if here.get(step) is None:
                here[step] = {}
            here = here[step]
        else:
            raise RecipeError(f"{origin}: {dotted}: {place} is a value, not a section")
    place = ".".join(way)
    if is_list(here):
        position = _position(here, last, place, origin)
        here[position] = merge({last: here[position]}, {last: value}).get(last)
    elif is_mapping(here):
        changed = merge(here, {last: value}, verbatim=VERBATIM in way)
        here.clear()
        here.update(changed)
    else:
        raise RecipeError(f"{origin}: {dotted}: {place} is a value, not a section")


def as_layer(dotted: str, value: Any) -> dict[str, Any]:
    """One assignment as a tree, to find out later who wrote a field."""
    tree: Any = value
    for step in reversed(dotted.split(".")):
        tree = {step: tree}
    return tree


def _position(entries: Sequence[Any], step: str, place: str, origin: str) -> int:
    names = [_name(entry) for entry in entries]
    if step in names:
        return names.index(step)
    if step.isdecimal() and int(step) < len(entries):
        return int(step)
    if step.isdecimal():
        raise RecipeError(f"{origin}: {place}.{step}: the list has {len(entries)} entries, counted from 0")
    raise RecipeError(f"{origin}: {place}.{step}: no entry of that name; {nearest(step, filter(None, names))}")
