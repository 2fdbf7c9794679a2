"""LLaVA-MoD small enough to run in a second: dense mimic, sparse mimic, preferences, over the parts of `tiny`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.runs.tiny import COLOURS, language, write_recipe

SPARSE = ["projector", "language.feed_forward", "language.router"]
STUDENT = {**language(16, layers=3), "model_type": "qwen2"}


def write_preferences(directory: Path, rows: int) -> None:
    """`pairs.json`: the colour of each picture, and another one. `rated.json`: one of the two, and whether it is right.
    Every fourth row is text only."""
    pairs, rated = [], []
    for row in range(rows):
        right, wrong = (f"a {COLOURS[(row + step) % len(COLOURS)]} picture" for step in (0, 2))
        picture = {} if row % 4 == 3 else {"image": f"{row}.png"}
        asked = [{"from": "human", "value": ("<image>\n" if picture else "") + "what colour is this"}]
        answers = {"chosen": {"from": "gpt", "value": right}, "rejected": {"from": "gpt", "value": wrong}}
        pairs.append({"id": row, **picture, "conversations": asked, **answers})
        given = [*asked, {"from": "gpt", "value": right if row % 2 else wrong}]
        rated.append({"id": row, **picture, "conversations": given, "label": bool(row % 2)})
    (directory / "pairs.json").write_text(json.dumps(pairs))
    (directory / "rated.json").write_text(json.dumps(rated))


def write_mod_recipe(directory: Path, rows: int = 10, **changes: Any) -> Path:
    """A recipe of three stages, d2d, d2s and pd; `changes` replace top-level sections."""
    path = write_recipe(directory, rows)
    write_preferences(directory, rows)
    recipe = yaml.safe_load(path.read_text())
    recipe["name"] = "tiny-mod"
    recipe["student"]["language"]["config"] = STUDENT
    recipe["pictures"] = {}
    for name in ("pairs", "rated"):
        recipe["data"][name] = {"path": str(directory / f"{name}.json"), "images": str(directory / "pictures")}
    optim = {"lr": 0.01, "batch": 4, "epochs": 2, "clip": 1.0}
    upcycle = {"do": "upcycle", "experts": 4, "top_k": 2, "layers": "even"}
    mimic = {"text": 1.0, "response": 1.0, "balance": 0.01}
    preference = {"text": 0.0, "preference": 1.0, "preference_kind": "kto", "balance": 0.01}
    recipe["stages"] = [
        {
            "name": "d2d",
            "train": ["projector", "language"],
            "data": ["questions"],
            "loss": {"text": 0.0, "response": 1.0},
            "optim": optim,
        },
        {
            "name": "d2s",
            "transform": [upcycle],
            "train": SPARSE,
            "data": ["questions"],
            "loss": mimic,
            "optim": optim,
        },
        {"name": "pd", "train": SPARSE, "data": ["pairs"], "loss": preference, "optim": {**optim, "lr": 1e-3}},
    ]
    recipe.update(changes)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
