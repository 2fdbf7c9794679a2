"""From files to a `Recipe`: `extends`, presets, overrides, then the schema.

extends: llava-kd.yaml            # what this file changes is laid over that one
presets:                          # named sets of overrides ...
  code: {stages.dpt.loss.relation: 1.0}
preset: code                      # ... of which the chosen ones are applied first, then those of the caller
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from distilvlm.recipe.dialect import parse
from distilvlm.recipe.errors import Layer, RecipeError, explain, nearest
from distilvlm.recipe.merge import as_layer, assign, merge
from distilvlm.recipe.schema import Recipe, Section
from distilvlm.recipe.tree import is_list, is_mapping
from distilvlm.recipe.written import mark, resolve, substitute

SectionType = TypeVar("SectionType", bound=Section)


def load_recipe(
    path: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> Recipe:
    """Read, compose and check a recipe file.

    `overrides` are dotted fields with their values, or strings `a.b.0.c=VALUE` whose VALUE is YAML; entries of a list
    are meant by index or by name. They are applied after the preset(s); `preset=NAME` (or `NAME,NAME`) replaces the
    file's own choice of presets. `variables` are what `${NAME}` stands for, before the environment is asked.

    Raises `RecipeError`, one line per problem, with file, dotted field and the nearest known name.
    """
    layers = _chain(Path(path), ())
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = merge(tree, layer.tree)
    presets: Any = tree.pop("presets", None) or {}
    chosen = tree.pop("preset", None)
    changes = _as_pairs(overrides, str(path))
    for origin, field, value in changes:
        if field == "preset":
            chosen = value
        elif field.split(".")[0] in ("presets", "extends"):
            raise RecipeError(f"{origin}: '{field}' belongs into the file and cannot be overridden")
    selected = _preset_pairs(chosen, presets, layers[-1].origin)
    for origin, field, value in [*selected, *(change for change in changes if change[1] != "preset")]:
        assign(tree, field, value, origin)
        layers.append(Layer(origin, as_layer(field, value)))
    return _validated(Recipe, resolve(tree, variables), layers)


def load_file(path: str | Path, schema: type[SectionType], variables: Mapping[str, str] | None = None) -> SectionType:
    """Read and check a file that is no recipe by the same rules: strict keys, `${NAME}`, paths relative to the file.

    Raises `RecipeError` as `load_recipe` does.
    """
    path = Path(path)
    layer = Layer(str(path), mark(_read(path), str(path), path.parent.absolute()), whole=True)
    return _validated(schema, resolve(layer.tree, variables), [layer])


def _validated(schema: type[SectionType], tree: Any, layers: Sequence[Layer]) -> SectionType:
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise explain(error, tree, layers, schema) from None


def _chain(path: Path, below: tuple[Path, ...]) -> list[Layer]:
    """The files from the deepest ancestor to `path`."""
    whole = path.absolute().resolve()
    if whole in below:
        circle = " → ".join(p.name for p in (*below[below.index(whole) :], whole))
        raise RecipeError(f"{path}: extends: goes in a circle: {circle}")
    tree = _read(path)
    parent = tree.pop("extends", None)
    own = Layer(str(path), mark(tree, str(path), path.parent.absolute()), whole=True)
    if parent is None:
        return [own]
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends: must be the path of one recipe file (here: {parent!r})")
    return [*_chain(path.parent / substitute(parent, f"{path}: extends"), (*below, whole)), own]


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        neighbours = [p.name for p in path.parent.glob("*.y*ml")]
        raise RecipeError(f"{path}: no such recipe file; {nearest(path.name, neighbours)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not is_mapping(tree):
        raise RecipeError(f"{path}: must be a mapping of recipe sections (name, student, data, stages, ...)")
    return tree


def _as_pairs(overrides: Mapping[str, Any] | Sequence[str], file: str) -> list[tuple[str, str, Any]]:
    """(origin for messages, dotted field, value) of every override, in order."""
    pairs: list[tuple[str, Any]] = []
    if is_mapping(overrides):
        pairs = list(overrides.items())
    else:
        for text in [overrides] if isinstance(overrides, str) else overrides:
            field, equals, value = text.partition("=")
            if not equals:
                raise RecipeError(f"{file}: override '{text}': write FIELD=VALUE, e.g. stages.0.optim.lr=1e-4")
            try:
                pairs.append((field.strip(), parse(value)))
            except yaml.YAMLError as error:
                raise RecipeError(f"{file}: override '{text}': the value is not valid YAML: {error}") from None
    origin = f"{file} (overridden)"
    return [(origin, field, mark(value, origin, Path.cwd())) for field, value in pairs]


def _preset_pairs(chosen: Any, presets: Any, origin: str) -> list[tuple[str, str, Any]]:
    """What the chosen presets assign: one name, several with commas, or a list of names."""
    if chosen is None:
        return []
    if not is_mapping(presets) or not all(is_mapping(p) for p in presets.values()):
        raise RecipeError(f"{origin}: presets: must map a name to dotted fields with their values")
    names = [name.strip() for name in chosen.split(",")] if isinstance(chosen, str) else chosen
    if not is_list(names):
        raise RecipeError(f"{origin}: preset: must be a name or a list of names (here: {chosen!r})")
    pairs: list[tuple[str, str, Any]] = []
    for name in names:
        if name not in presets:
            where = getattr(name, "origin", origin)
            raise RecipeError(f"{where}: preset: no preset '{name}'; {nearest(str(name), presets)}")
        pairs += [(f"{origin} (preset '{name}')", str(field), value) for field, value in presets[name].items()]
    return pairs
