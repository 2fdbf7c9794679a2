"""Packaged convolutional encoders: stock classes compute what the published layers do, to the last tensor."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoImageProcessor, EfficientNetConfig, EfficientNetModel, MobileNetV2Config, MobileNetV2Model

from distilvlm.models.encoders import build_encoder
from distilvlm.models.packaged_encoders import (
    LITE,
    LITE_STATISTICS,
    PackagedError,
    lite_weights,
    mobilenet_weights,
    save_stock,
    tinyvit_weights,
    write_processor,
)
from distilvlm.models.towers import IMAGENET
from distilvlm.recipe.encoders import EncoderSpec

LITE_TINY = EfficientNetConfig(
    image_size=32,
    width_coefficient=1.0,
    depth_coefficient=1.0,
    in_channels=[32, 8],
    out_channels=[8, 16],
    kernel_sizes=[3, 5],
    strides=[1, 2],
    expand_ratios=[1, 6],
    num_block_repeats=[1, 2],
    hidden_act="relu6",
    hidden_dim=1280,
)


def norm(width):
    module = nn.BatchNorm2d(width, eps=1e-3)
    module.running_mean.normal_(std=0.1)
    module.running_var.uniform_(0.5, 2)
    nn.init.uniform_(module.weight, 0.5, 2)
    nn.init.normal_(module.bias, std=0.1)
    return module


class LiteBlock(nn.Module):
    """A block of the published network, under its names: no squeeze-and-excitation, TensorFlow's padding."""

    def __init__(self, width, out, kernel, stride, expand):
        super().__init__()
        inner = width * expand
        if expand > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(width, inner, 1, bias=False), norm(inner)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, out, 1, bias=False), norm(out)
        self.kernel, self.stride, self.skips = kernel, stride, stride == 1 and width == out

    def forward(self, x):
        h = x
        if hasattr(self, "_expand_conv"):
            h = nn.functional.relu6(self._bn0(self._expand_conv(h)))
        h = nn.functional.relu6(self._bn1(self._depthwise_conv(same(h, self.kernel, self.stride))))
        h = self._bn2(self._project_conv(h))
        return x + h if self.skips else h


class Lite(nn.Module):
    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), norm(32)
        blocks = [(32, 8, 3, 1, 1), (8, 16, 5, 2, 6), (16, 16, 5, 1, 6)]
        self._blocks = nn.ModuleList(LiteBlock(*block) for block in blocks)
        self._conv_head, self._bn1 = nn.Conv2d(16, 1280, 1, bias=False), norm(1280)
        self._fc = nn.Linear(1280, 10)

    def forward(self, x):
        h = nn.functional.relu6(self._bn0(self._conv_stem(same(x, 3, 2))))
        for block in self._blocks:
            h = block(h)
        return nn.functional.relu6(self._bn1(self._conv_head(h)))


def same(x, kernel, stride):
    needed = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
    first = needed // 2
    return nn.functional.pad(x, [first, needed - first, first, needed - first])


@pytest.fixture
def lite():
    torch.manual_seed(0)
    return Lite().eval()


def test_efficientnet_lite_is_efficientnet_with_gates_held_open(tmp_path, lite):
    save_stock(EfficientNetModel, LITE_TINY, lite_weights(lite.state_dict(), LITE_TINY), tmp_path)
    write_processor(tmp_path, "EfficientNetImageProcessor", 32, LITE_STATISTICS)
    built = build_encoder(EncoderSpec.model_validate({"from": str(tmp_path)}), "lite")
    assert built.view.mean == (127 / 255,) * 3  # not ImageNet's
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = lite(pixels).flatten(2).transpose(1, 2)
    assert expected.std() > 0.1
    assert torch.equal(built.see(pixels).tokens, expected)  # a gate is 1.0 exactly


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_a_weight_that_does_not_fit_is_named(tmp_path, lite, damage):
    weights = lite_weights(lite.state_dict(), LITE_TINY)
    name = "encoder.blocks.1.projection.project_conv.weight"
    kind = {"missing": "missing", "unknown": "unexpected", "shape": "mismatched"}[damage]
    if damage == "missing":
        weights.pop(name)
    elif damage == "unknown":
        weights[name := "encoder.blocks.9.projection.project_conv.weight"] = torch.ones(1)
    else:
        weights[name] = torch.ones(3, 3, 1, 1)
    with pytest.raises(PackagedError, match=f"{kind} keys.*{name}"):
        save_stock(EfficientNetModel, LITE_TINY, weights, tmp_path / "out")


@pytest.mark.parametrize(("variant", "width", "depth"), [("lite0", 1.0, 1.0), ("lite1", 1.0, 1.1), ("lite2", 1.1, 1.2)])
def test_variants_follow_the_published_scaling_but_for_their_ends(variant, width, depth):
    channels, repeats, size = LITE[variant]
    assert channels == [int(base * width + 4) // 8 * 8 for base in (16, 24, 40, 80, 112, 192, 320)]
    assert repeats == [1, *(math.ceil(base * depth) for base in (2, 2, 3, 3, 4)), 1]
    assert size % 32 == 0  # what the stock class pads as TensorFlow does


def test_odd_sides_are_warned_of(tmp_path, lite, caplog):
    save_stock(EfficientNetModel, LITE_TINY, lite_weights(lite.state_dict(), LITE_TINY), tmp_path)
    build_encoder(EncoderSpec.model_validate({"from": str(tmp_path), "size": 36}), "lite")
    assert "encoder 'lite': at 36 px a side is halved where it is odd" in caplog.text


def conv_norm(width, out, kernel=1, stride=1, groups=1):
    padding = kernel // 2
    module = norm(out)
    module.eps = 1e-5
    return [nn.Conv2d(width, out, kernel, stride, padding, groups=groups, bias=False), module]


class Residual(nn.Module):
    def __init__(self, width, out, stride, expand):
        super().__init__()
        inner = width * expand
        layers = [*conv_norm(width, inner), nn.ReLU6()] if expand > 1 else []
        layers += [*conv_norm(inner, inner, 3, stride, inner), nn.ReLU6(), *conv_norm(inner, out)]
        self.conv = nn.Sequential(*layers)
        self.skips = stride == 1 and width == out

    def forward(self, x):
        return x + self.conv(x) if self.skips else self.conv(x)


def test_mobilenetv2_in_torchvisions_layout_becomes_the_stock_one(tmp_path):
    torch.manual_seed(0)
    features = [nn.Sequential(*conv_norm(3, 8, 3, 2), nn.ReLU6()), Residual(8, 8, 1, 1)]
    stages = [(8, 2, 2), (8, 3, 2), (16, 4, 2), (24, 3, 1), (40, 3, 2), (80, 1, 1)]  # a quarter of the width
    width = 8
    for out, count, stride in stages:
        for number in range(count):
            features.append(Residual(width, out, 1 if number else stride, 6))
            width = out
    features.append(nn.Sequential(*conv_norm(80, 1280), nn.ReLU6()))
    published = nn.Module()
    published.features = nn.Sequential(*features)
    published.eval()
    config = MobileNetV2Config(depth_multiplier=0.25, tf_padding=False, layer_norm_eps=1e-5, image_size=64)
    save_stock(MobileNetV2Model, config, mobilenet_weights(published.state_dict()), tmp_path)
    built = build_encoder(EncoderSpec.model_validate({"from": str(tmp_path)}), "mobile")
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = published.features(pixels).flatten(2).transpose(1, 2)
    assert expected.std() > 0.1
    torch.testing.assert_close(built.see(pixels).tokens, expected, atol=1e-3, rtol=0)


def test_tinyvits_names_are_timms_and_the_step_down_moves_to_the_next_stage():
    published = {
        "image_encoder.patch_embed.seq.0.c.weight": torch.tensor(0),
        "image_encoder.patch_embed.seq.2.bn.bias": torch.tensor(1),
        "image_encoder.layers.0.downsample.conv1.c.weight": torch.tensor(2),
        "image_encoder.layers.1.blocks.0.attn.attention_biases": torch.tensor(3),
        "image_encoder.layers.1.blocks.0.attn.attention_bias_idxs": torch.tensor(4),
        "image_encoder.neck.0.weight": torch.tensor(5),
        "mask_decoder.x": torch.tensor(6),
    }
    assert {name: int(value) for name, value in tinyvit_weights(published).items()} == {
        "patch_embed.conv1.conv.weight": 0,
        "patch_embed.conv2.bn.bias": 1,
        "stages.1.downsample.conv1.conv.weight": 2,
        "stages.1.blocks.0.attn.attention_biases": 3,
    }


def test_a_processor_resizes_and_normalises_as_the_canvas_does(tmp_path):
    write_processor(tmp_path, "MobileNetV2ImageProcessor", 224, IMAGENET)
    facts = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert facts["size"] == {"height": 224, "width": 224} and not facts["do_center_crop"]
    picture = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    stock = processor(picture.permute(1, 2, 0).numpy(), return_tensors="pt").pixel_values
    mean = torch.tensor(facts["image_mean"]).view(3, 1, 1)
    std = torch.tensor(facts["image_std"]).view(3, 1, 1)
    torch.testing.assert_close(stock[0], (picture / 255 - mean) / std, atol=1e-5, rtol=0)
