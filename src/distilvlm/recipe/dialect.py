"""The YAML that recipes are written in: PyYAML's safe one, without two of its traps.

PyYAML follows YAML 1.1, where `1e-3` is a string, and a key that stands twice silently keeps its last value.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from itertools import chain
from typing import Any

import yaml

_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")

MOST = 100_000
"""Values that a document may hold, aliases written out: a few lines of aliases of aliases stand for billions."""


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys; reads numbers in scientific notation without a point as numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain name", key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))  # pyright: ignore[reportUnknownMemberType]


def parse(text: str) -> Any:
    """One YAML document. Raises `yaml.YAMLError`, also for what PyYAML itself stumbles over."""
    loader: Any = _Loader(text)  # its types are unknown
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST:
            raise yaml.YAMLError(f"its aliases (*name) stand for more than {MOST:,} values: write them out")
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or an alias (*name) stands inside of itself") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # dates and numbers that are none, odd tags
        raise yaml.YAMLError(f"a value in it can't be read: {error}") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node is once every alias is written out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        value: Any = node.value
        inner: list[yaml.Node] = [*chain(*value)] if isinstance(node, yaml.MappingNode) else value
        known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


def render(tree: Any) -> str:
    """YAML that `parse` reads back to an equal tree, keys in the given order."""
    dumped: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)  # pyright: ignore
    return dumped
