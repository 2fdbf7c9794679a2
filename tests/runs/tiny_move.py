"""MoVE-KD small enough to run in a second: an encoder alone, or a VLM, taught by random encoders of three kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.runs.tiny import VISION, write_recipe

CNN = {
    "model_type": "convnext",
    "num_channels": 3,
    "hidden_sizes": [8, 12],
    "depths": [1, 1],
    "num_stages": 2,
    "patch_size": 4,
}
"""24 px → 3×3 tokens of 12 channels."""

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
ENCODERS = {
    "anchor": {},
    "cnn": {"config": CNN, "size": 24},
    "siglip": {"config": SIGLIP, "layer": -1},
}
MIX = {"do": "mix", "experts": 3, "rank": 2, "start": "kaiming", "dropout": 0.1}
OPTIM = {"lr": 0.01, "batch": 4, "updates": 3, "clip": 1.0}
TRAINED = ["vision.experts", "vision.router", "adapters"]


def write_alone(directory: Path, rows: int = 10, **changes: Any) -> Path:
    """Two stages on the pictures of a directory: experts, then the whole tower. `changes` replace sections."""
    path = write_recipe(directory, rows)
    recipe = yaml.safe_load(path.read_text())
    loss = {"text": 0.0, "encoder": 1.0, "expert_balance": 0.01}
    recipe |= {
        "name": "tiny-move",
        "student": {"vision": {"config": VISION}},
        "encoders": ENCODERS,
        "data": {"pictures": {"path": str(directory / "pictures")}},
        "stages": [
            {
                "name": "experts",
                "transform": [MIX],
                "train": TRAINED,
                "data": ["pictures"],
                "loss": loss,
                "optim": OPTIM,
            },
            {"name": "all", "train": ["vision", "adapters"], "data": ["pictures"], "loss": loss, "optim": OPTIM},
        ],
    }
    del recipe["teacher"]
    recipe |= changes
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}, sort_keys=False))
    return path


def write_vlm(directory: Path, rows: int = 10, **changes: Any) -> Path:
    """The published two stages, over a VLM: captions, then questions of which some have no picture."""
    path = write_recipe(directory, rows)
    recipe = yaml.safe_load(path.read_text())
    loss = {"text": 1.0, "encoder": 0.5, "expert_balance": 0.01}
    recipe |= {
        "name": "tiny-move-vlm",
        "encoders": ENCODERS,
        "stages": [
            {
                "name": "pretrain",
                "transform": [MIX],
                "train": ["projector", *TRAINED],
                "data": ["captions"],
                "loss": loss,
                "optim": OPTIM,
            },
            {
                "name": "finetune",
                "train": ["projector", "language", "vision", "adapters"],
                "data": ["questions"],
                "loss": loss,
                "optim": OPTIM,
            },
        ],
    }
    del recipe["teacher"]
    recipe |= changes
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}, sort_keys=False))
    return path
