"""Frozen vision encoders as teachers: one small interface over transformers' ViTs, CNNs and SAM, and timm.

interface.py says what a teacher gives; `build_encoder` makes one from a recipe's section, `frozen_copy` from a student.
attention.py computes the one row of attention that weighs tokens, importance.py what stands in where there is no CLS.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import cls_attention
    from .build import build_encoder, frozen_copy
    from .importance import importance_of, query_of, regrid
    from .interface import EncoderTeacher, Seen, View
    from .sam import reference_layout

__all__ = [
    "EncoderTeacher",
    "Seen",
    "View",
    "build_encoder",
    "cls_attention",
    "frozen_copy",
    "importance_of",
    "query_of",
    "reference_layout",
    "regrid",
]

_HOMES = {
    "EncoderTeacher": "interface",
    "Seen": "interface",
    "View": "interface",
    "build_encoder": "build",
    "cls_attention": "attention",
    "frozen_copy": "build",
    "importance_of": "importance",
    "query_of": "importance",
    "reference_layout": "sam",
    "regrid": "importance",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # imported when asked for, as in the room around
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
