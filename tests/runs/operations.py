"""Kinds of file operations of a run."""

from __future__ import annotations

import re


def kind_of(operation: str) -> str:
    """Files that are written one after the other by the same code are one kind, whatever they are called."""
    for pattern, name in ((r"\d{8}", "UPDATE"), (r"\d\d-[a-z]+", "STAGE"), (r"[0-9a-f]{16}", "DIGEST")):
        operation = re.sub(pattern, name, operation)
    return re.sub(r"(unlink |partial:\w+/)(?!manifest)\w+\.(json|safetensors|jinja)$", r"\1FILE", operation)
