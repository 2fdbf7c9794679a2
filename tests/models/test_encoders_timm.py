"""timm's encoders, in timm's own form of a directory; skipped where timm is not installed."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from distilvlm.models.encoders import build_encoder, timm_models
from distilvlm.recipe.encoders import EncoderSpec

from .encoder_models import canvases

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
CNN = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]}


@pytest.fixture
def written(tmp_path):
    """written(architecture, model_args) → directory of a random model, with its classifier, and the model."""
    if not timm_models.is_there():
        pytest.skip("timm is not installed: pip install 'distilvlm[timm]'")

    def write(architecture, arguments, **state):
        torch.manual_seed(0)
        model = timm_models.timm().create_model(architecture, **arguments).eval()
        save_file(model.state_dict() | state, tmp_path / "model.safetensors")
        pictures = {"input_size": [3, 32, 32], "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
        config = {"architecture": architecture, "model_args": arguments, "pretrained_cfg": pictures}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path, model

    return write


def built(directory, **fields):
    return build_encoder(EncoderSpec.model_validate({"from": str(directory), **fields}), "teacher")


def test_a_vits_last_block_is_read_without_the_closing_norm(written):
    directory, model = written("vit_tiny_patch16_224", VIT)
    teacher = built(directory)
    assert (teacher.view.mean, teacher.view.std, teacher.grid) == ((0.4,) * 3, (0.2,) * 3, (4, 4))
    pixels = teacher.pixels(canvases())
    with torch.no_grad():
        states = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
        states = model.blocks(states)
    seen = teacher.see(pixels)
    torch.testing.assert_close(seen.tokens, states[:, 1:])
    torch.testing.assert_close(seen.cls, states[:, 0])
    earlier = built(directory, layer=0)
    assert not torch.equal(earlier.see(pixels).tokens, seen.tokens) and earlier.identity != teacher.identity


def test_a_cnns_features_are_those_before_pooling_row_by_row(written):
    directory, model = written("convnext_atto", CNN)
    teacher = built(directory, size=64)
    pixels = teacher.pixels(canvases())
    with torch.no_grad():
        maps = model.forward_features(pixels)  # [3, 20, 2, 2]
    tokens = teacher.see(pixels).tokens
    assert torch.equal(tokens[:, 1], maps[:, :, 0, 1]) and torch.equal(tokens[:, 2], maps[:, :, 1, 0])
    assert built(directory, size=64, layer=1).channels == 12


def test_a_vit_sees_other_sizes_by_interpolation(written):
    directory, _ = written("vit_tiny_patch16_224", VIT)
    teacher = built(directory, size=48)
    assert teacher.grid == (6, 6) and teacher.see(teacher.pixels(canvases())).tokens.shape[1] == 36


def test_shapes_are_known_without_weights_and_the_classifier_does_not_count(written):
    directory, _ = written("convnext_atto", CNN)
    planned = build_encoder(EncoderSpec.model_validate({"from": str(directory), "size": 64}), "teacher", meta=True)
    assert (planned.grid, planned.channels, planned.device.type) == ((2, 2), 20, "meta")
    before = built(directory).identity
    written("convnext_atto", CNN, **{"head.fc.bias": torch.ones(1000)})
    assert built(directory).identity == before


def test_weights_that_do_not_fit_are_refused(written):
    directory, _ = written("convnext_atto", CNN, **{"stages.0.extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"(?s)do not fit ConvNeXt.*stages\.0\.extra"):
        built(directory)


def test_timm_comes_without_torchvision_and_leaves_no_stand_in_behind(written):
    written("convnext_atto", CNN)
    assert "timm" in sys.modules
    assert not [name for name, module in sys.modules.items() if type(module) is timm_models._Nothing]


def test_without_timm_the_way_to_get_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "x",
                "pretrained_cfg": {"input_size": [3, 8, 8]} | dict.fromkeys(["mean", "std"], [0.5] * 3),
            }
        )
    )
    monkeypatch.setattr(timm_models, "is_there", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'distilvlm\[timm\]'"):
        built(tmp_path)
