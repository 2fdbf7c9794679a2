"""Experts in a tower that came from a checkpoint: published checkpoints name tensors otherwise than today's classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distilvlm.models.encoder_directory import load_encoder, save_encoder
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.mixed_classes import VARIANT
from distilvlm.models.mixture import MixConfig, mix, mixtures
from distilvlm.models.save import load, save
from distilvlm.models.towers import HALF, layout_of, pretrained_tower

from .test_tower_mixture import FAMILIES, tower_of


def from_checkpoint(family: str, place: Path) -> Any:
    stock = tower_of(family)
    stock.save_pretrained(place)
    return pretrained_tower(str(place), stock.config, torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("experts", [1, 3])
def test_a_tower_of_a_checkpoint_keeps_its_experts(family: str, experts: int, tmp_path: Path) -> None:
    tower = from_checkpoint(family, tmp_path / "stock")
    mix(tower, MixConfig(experts=experts, rank=2), -2)  # which change nothing yet
    save_encoder(tower, layout_of(tower.config, -2, "patches", HALF), tmp_path / "mixed", "square")
    found = load_encoder(tmp_path / "mixed").model.tower
    assert bool(mixtures(found)) == (experts > 1)
    assert fingerprint(found) == fingerprint(tower if experts > 1 else tower_of(family))


def test_tensors_keep_the_names_of_their_checkpoint(tmp_path: Path) -> None:
    tower = from_checkpoint("dinov2", tmp_path / "stock")
    mix(tower, MixConfig(rank=2), -2)
    save_encoder(tower, layout_of(tower.config, -2, "patches", HALF), tmp_path / "mixed", "square")
    stock = {*load_file(tmp_path / "stock" / "model.safetensors")}
    assert any(".attention.attention.key." in name for name in stock)  # not as the class has it
    assert stock < {*load_file(tmp_path / "mixed" / f"model.{VARIANT}.safetensors")}


def test_a_llava_on_a_tower_of_a_checkpoint_keeps_its_experts(make: Any, tmp_path: Path) -> None:
    save(make("dinov2"), tmp_path / "stock", "square")
    vlm = load(tmp_path / "stock")
    mix(vlm.model.model.vision_tower, MixConfig(rank=2, start="kaiming"), vlm.layout.layer)
    save(vlm, tmp_path / "mixed", "square")
    assert fingerprint(load(tmp_path / "mixed").model) == fingerprint(vlm.model)
