"""A resolved recipe as text, and what differs between two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from distilvlm.recipe.dialect import parse, render
from distilvlm.recipe.merge import VERBATIM
from distilvlm.recipe.schema import Recipe
from distilvlm.recipe.tree import is_list, is_mapping


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every default written out (so that it still means the same when a default changes); `load_recipe` reads
    it back to an equal recipe. A relative path keeps meaning 'relative to the working directory' as long as nothing of
    that name stands beside the file."""
    return render(_mapped(_tree(recipe), lambda value: value.replace("${", "$${")))


def read_dump(text: str) -> Recipe:
    """The recipe of a text that `dump_recipe` wrote, wherever it lies: its paths are taken as they stand.

    Raises `ValueError` (pydantic's, or PyYAML's as its cause) for anything else.
    """
    try:
        return Recipe.model_validate(_mapped(parse(text), lambda value: value.replace("$${", "${")))
    except yaml.YAMLError as error:
        raise ValueError(f"not a dumped recipe: {error}") from error


def differences(old: Recipe, new: Recipe) -> list[str]:
    """One line `dotted.field: old → new` per field that differs; stages are named. Empty for equal recipes."""
    return _compare((), _tree(old), _tree(new))


def _tree(recipe: Recipe) -> dict[str, Any]:
    return _without_empty(recipe.model_dump(mode="json", by_alias=True))


def _without_empty(tree: Any) -> Any:
    """Leave out what is None: every such field's default. Architectures keep theirs, where it may not be."""
    if is_mapping(tree):
        return {k: v if k == VERBATIM else _without_empty(v) for k, v in tree.items() if v is not None}
    if is_list(tree):
        return [_without_empty(value) for value in tree]
    return tree


def _mapped(tree: Any, change: Callable[[str], str]) -> Any:
    """A copy of `tree` with every string value changed."""
    if is_mapping(tree):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if is_list(tree):
        return [_mapped(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree


def _compare(path: tuple[str, ...], old: Any, new: Any) -> list[str]:
    if old == new:
        return []
    if is_mapping(old) and is_mapping(new):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _compare((*path, key), old.get(key), new.get(key))]
    if path == ("stages",) and is_list(old) and is_list(new):
        before = {stage["name"]: stage for stage in old}
        after = {stage["name"]: stage for stage in new}
        lines = [] if list(before) == list(after) else [f"stages: {list(before)} → {list(after)}"]
        for name in before:
            if name in after:
                lines += _compare((*path, name), before[name], after[name])
        return lines
    return [f"{'.'.join(path)}: {_shown(old)} → {_shown(new)}"]


def _shown(value: Any) -> str:
    return "(none)" if value is None else repr(value)
