"""The functions of rows.yaml: a LLaVA row's first question and answer; right by VQA's normalisation, as ours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from distilvlm.evaluate import accurate


def pictures(row: Mapping[str, Any]) -> list[Image.Image]:
    names = row.get("image") or []
    root = Path(os.environ.get("PICTURES", "."))
    return [Image.open(root / name).convert("RGB") for name in ([names] if isinstance(names, str) else names)]


def question(row: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> str:
    return _said(row, "human").replace("<image>", "").strip()


def answer(row: Mapping[str, Any]) -> str:
    return _said(row, "gpt")


def judged(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"accuracy": float(accurate(results[0], answer(row)))}


def _said(row: Mapping[str, Any], who: str) -> str:
    return next(turn["value"] for turn in row["conversations"] if turn["from"] == who)
