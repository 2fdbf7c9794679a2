"""The YAML that recipes are written in: PyYAML's safe one, without two of its traps.

PyYAML follows YAML 1.1, where `1e-3` is a string, and a key that stands twice silently keeps its last value.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys; reads numbers in scientific notation without a point as numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
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
    """One YAML document. Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)


def render(tree: Any) -> str:
    """YAML that `parse` reads back to an equal tree, keys in the given order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
