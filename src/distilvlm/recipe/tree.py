"""What YAML gives: mappings, lists and scalars. Two guards that tell the type checker which one it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard


def is_mapping(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether this is a section (keys are strings wherever the schema has something to say)."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether this is a list of entries."""
    return isinstance(value, (list, tuple))
