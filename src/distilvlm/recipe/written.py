"""Strings as they are written in a recipe: `${VARIABLE}` in them, and paths relative to the file they stand in.

Both are resolved once, at the very end, so that a value which something later replaces needs neither its variable nor
its file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from glob import iglob
from pathlib import Path
from typing import Any

from distilvlm.recipe.errors import RecipeError, named
from distilvlm.recipe.merge import VERBATIM
from distilvlm.recipe.tree import is_list, is_mapping

PATH_KEYS = frozenset({"from", "tokenizer", "path", "images", "features", "recipe", "training", "training_images"}) | {
    "synonyms",
    "annotations",
    "deepspeed",
}
_REFERENCE = re.compile(r"\$\$\{|\$\{[^}]*\}?")
_WELL_FORMED = re.compile(r"\$\{(?P<name>[A-Za-z_]\w*)(?P<or>:-(?P<default>[^${}]*))?\}")


class Written(str):
    """A string that knows where it was written."""

    origin: str
    directory: Path

    def __new__(cls, text: str, origin: str, directory: Path) -> Written:
        made = super().__new__(cls, text)
        made.origin = origin
        made.directory = directory
        return made

    def __getnewargs__(self) -> tuple[str, str, Path]:  # type: ignore[override]  # so that deepcopy keeps the place
        return str(self), self.origin, self.directory


def mark(tree: Any, origin: str, directory: Path) -> Any:
    """A copy of `tree` whose string values know their place; keys stay plain."""
    if isinstance(tree, str):
        return Written(tree, origin, directory)
    if is_mapping(tree):
        return {str(key): mark(value, origin, directory) for key, value in tree.items()}
    if is_list(tree):
        return [mark(value, origin, directory) for value in tree]
    return tree


def resolve(
    tree: Any, variables: Mapping[str, str] | None = None, root: Any = None, path: tuple[str | int, ...] = ()
) -> Any:
    """A copy of `tree` with plain strings: variables substituted, and paths (fields of `PATH_KEYS`) made absolute when
    they are meant relative to the file that they are written in."""
    root = tree if root is None else root
    if is_mapping(tree):
        return {key: resolve(value, variables, root, (*path, key)) for key, value in tree.items()}
    if is_list(tree):
        return [resolve(value, variables, root, (*path, index)) for index, value in enumerate(tree)]
    if not isinstance(tree, Written):
        return tree
    text = substitute(tree, f"{tree.origin}: {'.'.join(named(path, root))}", variables)
    field = next((step for step in reversed(path) if isinstance(step, str)), None)  # a list's entries have its name
    return placed(text, tree.directory) if field in PATH_KEYS and VERBATIM not in path else text


def substitute(text: str, place: str, variables: Mapping[str, str] | None = None) -> str:
    """`${NAME}` and `${NAME:-default}` from `variables` or the environment, the default also for an empty one, as in a
    shell.

    `$${` stands for a literal `${`. Raises `RecipeError` that begins with `place` for a variable that is not set.
    """

    def value(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        reference = _WELL_FORMED.fullmatch(match[0])
        if reference is None:
            raise RecipeError(f"{place}: '{text}': write ${{NAME}} or ${{NAME:-default}} (not nested; $${{ for itself)")
        found = (variables or {}).get(reference["name"]) or os.environ.get(reference["name"])
        if reference["or"] is not None:
            return found or reference["default"]
        if found is None:
            raise RecipeError(
                f"{place}: environment variable {reference['name']} is not set; set it, or write a default: "
                f"${{{reference['name']}:-...}}"
            )
        return found

    return _REFERENCE.sub(value, text)


def placed(text: str, directory: Path) -> str:
    """A path as the recipe means it: './x' and '../x' belong to the file's directory, so does a name that exists there,
    or a pattern (`*`) of such; absolute paths, hub ids and everything else (relative to the working directory) stay as
    written."""
    if not text or Path(text).is_absolute():
        return text
    # str(Path) would take a leading './' off, so the text itself is asked.
    pattern = "*" in text and "://" not in text
    beside = (directory / text).exists() or (pattern and any(iglob(str(directory / text))))  # noqa: PTH207 - as text
    if text in (".", "..") or text.startswith(("./", "../")) or beside:
        return os.path.normpath(directory / text)
    return text
