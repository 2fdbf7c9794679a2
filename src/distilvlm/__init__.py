"""distilvlm: compact vision-language models by distillation. A recipe is a list of stages; a run executes it.

run = distilvlm.run("recipe.yaml", directory="runs/x")   # continues if the directory exists
plan = distilvlm.plan("recipe.yaml")                     # resolved stages; trains nothing, needs no weights
model = distilvlm.load(path)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distilvlm.models.save import load
    from distilvlm.runs.execute import run
    from distilvlm.runs.plan import plan

# On a CPU, oneDNN and torch's bridge to it each keep kernels and buffers of the last 1,024 shapes that they have met:
# a gigabyte where lengths vary, and more with every run in the process. An update has a few dozen shapes.
for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_variable, "64")

__version__ = "0.1.0"
__all__ = ["load", "plan", "run"]

_HOMES = {"run": "distilvlm.runs.execute", "plan": "distilvlm.runs.plan", "load": "distilvlm.models.save"}


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch and transformers take seconds, and `distilvlm --help` needs neither.
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in {"losses", "models"}:
        return importlib.import_module(f"distilvlm.{name}")
    raise AttributeError(f"module 'distilvlm' has no attribute {name!r}")
