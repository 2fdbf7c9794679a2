"""A small recipe to lay things over."""

from __future__ import annotations

from pathlib import Path

import pytest

BASE = """
name: base
student:
  vision: {from: encoder, size: 28}
  language: {from: language}
data:
  rows: {path: rows.json}
stages:
  - name: first
    train: [projector]
    data: [rows]
    optim: {lr: 1e-3, batch: 4, updates: 10}
  - name: second
    train: [projector, language]
    data: [rows]
    optim: {lr: 2e-5, batch: 4, epochs: 1, clip: 1.0}
presets:
  quick: {stages.first.optim.updates: 2, stages.second.optim.lr: 5e-5}
  slow: {stages.second.optim.lr: 1e-6}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The recipe as `base.yaml` in the test's own directory."""
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path
