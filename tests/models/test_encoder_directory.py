"""Encoders with experts on disk: bit by bit, never without their experts by mistake, and as one stock encoder where
experts are alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, CLIPVisionModel, LlavaForConditionalGeneration

from distilvlm.models.encoder_directory import load_encoder, save_encoder
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.merging import merged
from distilvlm.models.mixed_classes import VARIANT
from distilvlm.models.mixture import MixConfig, mix, mixtures
from distilvlm.models.save import load, save
from distilvlm.models.stages import mixed as mixed_student
from distilvlm.models.towers import HALF, layout_of
from distilvlm.models.upcycling import upcycle
from distilvlm.recipe import Mix

from .test_tower_mixture import FAMILIES, mixed, pixels, states, tower_of

WEIGHTS = f"model.{VARIANT}.safetensors"


def saved(tower: Any, place: Path) -> Path:
    save_encoder(tower, layout_of(tower.config, -2, "patches", HALF), place, "square")
    return place


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "dinov3-gated"])
def test_an_encoder_with_experts_comes_back_bit_by_bit(family: str, tmp_path: Path):
    tower = mixed(family, routing="top1_scaled", alpha=2.0)
    encoder = load_encoder(saved(tower, tmp_path / "encoder"))
    assert fingerprint(encoder.model.tower) == fingerprint(tower)
    assert torch.equal(states(encoder.model.tower)[-2], states(tower)[-2])
    assert (encoder.layout.layer, encoder.layout.mean) == (-2, HALF[0])
    assert (tmp_path / "encoder" / "preprocessor_config.json").exists()


def test_damaged_and_foreign_directories_are_refused(tmp_path: Path):
    place = saved(mixed(), tmp_path / "encoder")
    weights = place / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged:\n.*with_experts\.safetensors"):
        load_encoder(place)
    tower_of().save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"foreign has no distilvlm\.json, which says what layer is read"):
        load_encoder(tmp_path / "foreign")


@pytest.mark.parametrize("family", FAMILIES)
def test_lone_experts_merge_into_a_stock_encoder(family: str, tmp_path: Path):
    tower = mixed(family, experts=1, alpha=2.0)
    before = fingerprint(tower)
    stock = merged(tower)
    assert type(stock) is type(tower_of(family))
    assert fingerprint(tower) == before
    one, other = states(stock)[-2], states(tower)[-2]
    torch.testing.assert_close(one, other, atol=3e-6 * float(other.detach().abs().max()), rtol=0)
    exact = copy.deepcopy(tower).double()
    shown = pixels().double()
    torch.testing.assert_close(states(merged(exact), shown)[-2], states(exact, shown)[-2], atol=1e-6, rtol=0)
    found = AutoModel.from_pretrained(saved(tower, tmp_path / "encoder")).eval()
    assert torch.equal(states(found)[-2], states(stock)[-2])
    assert not mixtures(found)


def test_several_experts_or_biases_without_a_place_do_not_merge():
    with pytest.raises(ValueError, match="only a tower with one expert"):
        merged(mixed(experts=2))
    with pytest.raises(ValueError, match="only a tower with one expert"):
        merged(tower_of())
    tower = tower_of("dinov3")
    for block in tower.model.layer if hasattr(tower, "model") else tower.layer:
        block.mlp.up_proj.bias = None
    mix(tower, MixConfig(experts=1, rank=2, start="kaiming"), -2)
    with torch.no_grad():
        for one in mixtures(tower):
            one.experts[0].up_bias.fill_(1)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"mlp\.up_proj has no bias .* mix with bias: false"):
        merged(tower)


def test_plain_transformers_refuses_several_experts(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoder, whole = saved(mixed(), tmp_path / "encoder"), tmp_path / "vlm"
    vlm = make("clip")
    mix(vlm.model.model.vision_tower, MixConfig(rank=2), -2)
    save(vlm, whole, "square")
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})  # what this package registered
    unknown = "distilvlm_mixed_clip_vision_model"
    for kind in (AutoConfig, AutoModel):
        with pytest.raises(ValueError, match=unknown):
            kind.from_pretrained(encoder)
    for kind in (AutoConfig, LlavaForConditionalGeneration):
        with pytest.raises((KeyError, ValueError), match=unknown):
            kind.from_pretrained(whole)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):  # a class that is named outright
        CLIPVisionModel.from_pretrained(encoder)


@pytest.mark.parametrize("experts", [1, 3])
def test_a_llava_with_experts_is_saved_and_comes_back(experts: int, make, make_batch, tmp_path: Path):
    vlm = make("dinov2")
    mix(vlm.model.model.vision_tower, MixConfig(experts=experts, rank=2, start="kaiming"), vlm.layout.layer)
    vlm.model.eval()
    save(vlm, tmp_path / "vlm", "square")
    found = load(tmp_path / "vlm")
    assert len(mixtures(found.model)) == (0 if experts == 1 else 2)
    if experts > 1:
        assert fingerprint(found.model.model.vision_tower) == fingerprint(vlm.model.model.vision_tower)
        assert found.without_weights().model.model.vision_tower.config.mixture["experts"] == 3
    else:
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "vlm")
    shown = pixels(2, 8)
    one, other = (states(model.model.model.vision_tower, shown)[vlm.layout.layer] for model in (vlm, found))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_a_sparse_llava_may_have_experts_in_its_tower_too(make, tmp_path: Path):
    how = Mix(do="mix", rank=2, start="kaiming")
    vlm = mixed_student(upcycle(make("clip", "llama", language_config={"intermediate_size": 32}), experts=2), how, 0)
    save(vlm, tmp_path / "vlm", "square")
    assert fingerprint(load(tmp_path / "vlm").model) == fingerprint(vlm.model)


def test_only_what_is_there_is_written(tmp_path: Path):
    """A tensor is neither missing nor left over, and a lone expert leaves no trace."""
    names = set(load_file(saved(mixed(), tmp_path / "three") / WEIGHTS))
    assert sum(".mixture.router." in name for name in names) == 2 * 3
    alone = saved(mixed(experts=1), tmp_path / "one")
    assert not [name for name in load_file(alone / "model.safetensors") if "mixture" in name]
    assert "mixture" not in (alone / "config.json").read_text()
