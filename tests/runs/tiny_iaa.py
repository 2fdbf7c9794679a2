"""IAA small enough to run in a second: a projector's alignment, an adaptor, a second one, over the parts of `tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.runs.tiny import language, write_recipe

LAYERS = 4
STUDENT = {**language(16, layers=LAYERS), "model_type": "qwen2"}
MULTIMODAL: dict[str, Any] = {"do": "insert", "adaptor": "multimodal", "layers": 2}
GROUNDING: dict[str, Any] = {"do": "insert", "adaptor": "grounding", "layers": [0, 3], "structure": "b"}


def write_iaa_recipe(directory: Path, rows: int = 10, **changes: Any) -> Path:
    """A recipe of three stages, align, multimodal and grounding; `changes` replace top-level sections."""
    path = write_recipe(directory, rows)
    recipe = yaml.safe_load(path.read_text())
    recipe["name"] = "tiny-iaa"
    recipe["student"]["language"]["config"] = STUDENT
    recipe["pictures"] = {}
    del recipe["teacher"]
    optim = {"lr": 0.01, "batch": 4, "epochs": 2, "clip": 1.0}
    recipe["stages"] = [
        {"name": "align", "train": ["projector"], "data": ["captions"], "optim": optim},
        {
            "name": "multimodal",
            "transform": [MULTIMODAL],
            "train": ["adaptor", "adaptor.projector"],
            "data": ["questions"],
            "optim": {**optim, "lr": 5e-4, "rates": {"adaptor.projector": 0.01}},
        },
        {"name": "grounding", "transform": [GROUNDING], "train": ["adaptor"], "data": ["questions"], "optim": optim},
    ]
    recipe.update(changes)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
