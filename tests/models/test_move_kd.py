"""Checkpoints of MoVE-KD's own code as encoders alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from distilvlm.cli import app
from distilvlm.models.encoder_directory import load_encoder
from distilvlm.models.mixture import mixtures
from distilvlm.models.move_kd import load
from distilvlm.models.sources import NotHere

from .test_tower_mixture import mixed, states, tower_of


def reference_of(tower: Any, prefix: str = "model.vision_tower.vision_tower.vision_model.") -> dict[str, Tensor]:
    """A tower's tensors as the method's code names them."""
    state: dict[str, Tensor] = {}
    for name, value in tower.state_dict().items():
        before, _, expert = name.partition("mixture.")
        if not expert:
            name = name.replace(".mlp.", ".mlp.original_module.")
            state[prefix + name] = value.clone()
        elif expert.startswith("router"):
            state[f"{prefix}{before}{expert}"] = value.clone()
        else:
            _, place, kind = expert.split(".")
            part, matrix = ("moe_down", "moe_up")[int(place)], "A" if kind.startswith("down") else "B"
            for number, one in enumerate(value):
                leaf = "bias" if kind.endswith("bias") else "weight"
                state[f"{prefix}{before}{part}.{number}.lora_{matrix}.{leaf}"] = (
                    one.T if kind == "up" else one
                ).clone()
    return {name: value.contiguous() for name, value in state.items()}


@pytest.fixture
def written(tmp_path: Path) -> tuple[Any, Path, Path]:
    """A tower with experts, the directory of its LLaVA, and that of the CLIP it was built on."""
    tower = mixed("clip", alpha=1.0)
    tower_of().save_pretrained(tmp_path / "clip")
    place = tmp_path / "checkpoint"
    place.mkdir()
    facts = {"mm_vision_tower": str(tmp_path / "clip"), "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    (place / "config.json").write_text(json.dumps(facts))
    return tower, place, tmp_path / "clip"


def test_a_whole_llava_gives_its_tower_in_one_dtype(written: tuple[Any, Path, Path]):
    tower, place, _ = written
    tensors = reference_of(tower)
    tensors = {n: v if "moe" in n or "router" in n else v.bfloat16() for n, v in tensors.items()}
    others = ("model.layers.0.mlp.gate_proj.weight", "model.eva_adapter_1.weight", "model.mm_projector.0.weight")
    tensors |= {name: torch.zeros(2, 2) for name in others}
    tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(3)
    save_file(tensors, place / "model.safetensors")
    encoder, geometry = load(place)
    assert (geometry, encoder.layout.layer, encoder.layout.select) == ("pad", -2, "default")
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    rounded = tower_with(tower, lambda name, value: value if "mixture" in name else value.bfloat16().float())
    assert torch.equal(states(encoder.model.tower)[-2], states(rounded)[-2])


def tower_with(tower: Any, change: Any) -> Any:
    tower.load_state_dict({name: change(name, value) for name, value in tower.state_dict().items()})
    return tower


def test_experts_alone_go_into_the_clip_that_they_belong_to(written: tuple[Any, Path, Path]):
    tower, place, clip = written
    experts = {n: v for n, v in reference_of(tower).items() if "moe" in n or "router" in n}
    torch.save(experts, place / "mole_encoder.bin")
    encoder, _ = load(place)
    assert torch.equal(states(encoder.model.tower)[-2], states(tower)[-2])
    (place / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no vision encoder"):
        load(place)
    assert load(place, vision=str(clip), alpha=2.0)[0].model.tower.config.mixture["alpha"] == 2


def test_the_command_writes_an_encoder_for_a_recipe(written: tuple[Any, Path, Path], tmp_path: Path):
    tower, place, _ = written
    save_file(reference_of(tower), place / "model.safetensors")
    result = CliRunner().invoke(app, ["convert-checkpoint", "move-kd", str(place), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "hidden state -2 is read, pictures are 'pad'" in result.output
    found = load_encoder(tmp_path / "out").model.tower
    assert len(mixtures(found)) == 3
    assert torch.equal(states(found)[-2], states(tower)[-2])


def test_what_is_no_checkpoint_of_the_method_s_is_refused(written: tuple[Any, Path, Path], tmp_path: Path):
    tower, place, _ = written
    with pytest.raises(NotHere):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"neither \*\.safetensors nor pytorch_model\*\.bin or mole_encoder\.bin"):
        load(place)
    tensors = reference_of(tower)
    without = {name: value for name, value in tensors.items() if "moe" not in name and "router" not in name}
    save_file(without, place / "model.safetensors")
    with pytest.raises(ValueError, match="checkpoint: no tensor is an expert's"):
        load(place)


@pytest.mark.parametrize(
    ("damaged", "value", "told"),
    [
        ("0.self_attn.k_proj.weight", None, r"lacks 1 .*\['encoder\.layers\.0\.self_attn\.k_proj\.weight'\]"),
        ("0.mlp.moe_down.0.lora_A.weight", None, r"lacks 1 .*\['encoder\.layers\.0\.mlp\.mixture\.experts\.0\.down'\]"),
        (
            "1.mlp.moe_up.2.lora_B.bias",
            None,
            r"another shape for 1 .*\['encoder\.layers\.1\.mlp\.mixture\.experts\.1\.up_b",
        ),
        (
            "1.mlp.original_module.fc1.bias",
            torch.zeros(3),
            r"another shape for 1 .*\['encoder\.layers\.1\.mlp\.fc1\.bias'\]",
        ),
        ("9.layer_norm1.bias", torch.zeros(16), r"has unknown 1 .*\['encoder\.layers\.9\.layer_norm1\.bias'\]"),
    ],
)
def test_a_tensor_that_is_missing_left_over_or_of_another_shape_is_named(
    written: tuple[Any, Path, Path], damaged: str, value: Tensor | None, told: str
):
    tower, place, _ = written
    tensors = reference_of(tower)
    name = f"model.vision_tower.vision_tower.vision_model.encoder.layers.{damaged}"
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, place / "model.safetensors")
    with pytest.raises(ValueError, match=rf"checkpoint {place} .*\(of a tower with experts\)") as caught:
        load(place)
    assert re.search(told, str(caught.value))
