"""Composing a VLM from any vision transformer and any causal language model, naming its parts, running, saving it.

Nobody outside this room knows a module path of Hugging Face's. `build` (compose.py) makes a model from a recipe's
section, `choose` (parts.py) says what trains, forward.py runs it, save.py keeps it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compose import build
    from .features import FeatureStore
    from .parts import choose, parameters_of, summary
    from .save import load
    from .sources import NotHere
    from .upcycling import upcycle
    from .vlm import VLM, VisionLayout

__all__ = [
    "VLM",
    "FeatureStore",
    "NotHere",
    "VisionLayout",
    "build",
    "choose",
    "load",
    "parameters_of",
    "summary",
    "upcycle",
]

# `save` and `fingerprint` are not among them: a function of its module's name would be hidden by the module as soon as
# that is imported. They are `models.save.save` and `models.fingerprint.fingerprint`.
_HOMES = {
    "VLM": "vlm",
    "FeatureStore": "features",
    "NotHere": "sources",
    "VisionLayout": "vlm",
    "build": "compose",
    "choose": "parts",
    "load": "save",
    "parameters_of": "parts",
    "summary": "parts",
    "upcycle": "upcycling",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: transformers takes seconds, and files.py is wanted without it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
