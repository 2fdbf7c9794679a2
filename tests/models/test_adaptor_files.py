"""Adaptors on disk, the base that they ask for, quantised bases, and checkpoints of the method's own repository."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distilvlm.models import build, hosted
from distilvlm.models.adaptors import AdaptorConfig, Host, files, published
from distilvlm.models.save import load
from distilvlm.models.sources import NotHere
from tests import adaptor_hosts as tiny
from tests.models.test_llava_mod import theirs
from tests.test_cli import command, keep_logging  # noqa: F401 - a fixture that every test here uses


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3-tied"])
@pytest.mark.parametrize("name", ["seeing", "pointing"])
def test_a_saved_adaptor_is_the_same_to_the_bit(tmp_path: Path, kind: str, name: str):
    host, given = tiny.host(kind), tiny.ids()
    files.save(host, name, tmp_path / "out", {"geometry": "pad"})
    again = Host.attach(tiny.model(kind))
    plain = again.model(given).logits
    made = files.load(again, tmp_path / "out")
    assert again.names == (name,) and made.config == host[name].config
    assert files.facts_of(tmp_path / "out")["extra"] == {"geometry": "pad"}
    assert files.config_of(tmp_path / "out") == made.config
    assert tiny.logits(again, name, given).equal(tiny.logits(host, name, given))
    assert tiny.logits(again, "text", given).equal(plain)
    assert all(parameter.requires_grad for parameter in made.parameters())
    files.load(again, tmp_path / "out", "other")
    assert tiny.logits(again, "other", given).equal(tiny.logits(host, name, given))


def test_nothing_of_the_base_is_in_the_file_and_a_tied_table_once(tmp_path: Path):
    host = tiny.host("llama-tied", one=AdaptorConfig(positions=(1,), structure="b", own_norm=False))
    files.save(host, "one", tmp_path / "out")
    held = load_file(tmp_path / "out" / files.WEIGHTS)
    layers = {f"layers.0.{name}" for name in host.base.layers[1].state_dict()}
    assert set(held) == layers | {"gates.0.weight", "gates.0.bias", "embed_tokens.weight"}
    assert sum(value.numel() * 4 for value in held.values()) == host.bytes("one")
    with pytest.raises(FileExistsError):
        files.save(host, "one", tmp_path / "out")
    files.save(host, "one", tmp_path / "out", replace=True)


def test_the_same_base_in_another_dtype_is_the_same_base(tmp_path: Path):
    host = tiny.host("llama", one=AdaptorConfig(positions=(1,)))
    host.model.bfloat16().float()
    files.save(host, "one", tmp_path / "out")
    other = Host.attach(tiny.model().bfloat16())
    assert files.load(other, tmp_path / "out").norm.weight.dtype == torch.float32  # as it was saved


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 5}, "its layers is 4, this one's 5"),
        ({"hidden_size": 32}, "its width is 24, this one's 32"),
        ({"vocab_size": 41}, "its vocabulary is 40, this one's 41"),
        ({"class": "qwen2"}, "its layer_class is LlamaDecoderLayer, this one's Qwen2DecoderLayer"),
        ({"seed": 1}, "the language model here is of the same form and has other weights"),
    ],
)
def test_another_base_is_refused_with_what_differs(
    tmp_path: Path, change: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
):
    files.save(tiny.host("llama", one=AdaptorConfig(positions=(1,))), "one", tmp_path / "out")
    kind, seed = change.pop("class", "llama"), change.pop("seed", 0)
    monkeypatch.setattr(tiny, "SIZE", tiny.SIZE | change)
    other = Host.attach(tiny.model(kind, seed))
    with pytest.raises(ValueError, match=f"another base: .*{told}"):
        files.load(other, tmp_path / "out")
    if seed:
        files.load(other, tmp_path / "out", accept_other_weights=True)
        assert tiny.logits(other, "one", tiny.ids()).isfinite().all()


def test_an_adaptor_that_sees_asks_for_its_vision_tower(tmp_path: Path, make):
    vlm = make("clip", "llama")
    host = Host.attach(vlm.model)
    host.add("one", AdaptorConfig(positions=(1,), projector=True))
    files.save(host, "one", tmp_path / "out")
    again = Host.attach(make("clip", "llama").model)
    tiny.disturb(again.model.model.multi_modal_projector.parameters())  # the base's own may be another
    files.load(again, tmp_path / "out")
    blind = Host.attach(make("clip", "llama").model)
    tiny.disturb(blind.model.model.vision_tower.parameters())
    with pytest.raises(ValueError, match="the vision tower here is of the same form and has other weights"):
        files.load(blind, tmp_path / "out")


def test_damage_is_told(tmp_path: Path):
    host = tiny.host("llama", one=AdaptorConfig(positions=(1,)))
    files.save(host, "one", tmp_path / "out")
    file = tmp_path / "out" / files.WEIGHTS
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged:\n.*adaptor\.safetensors: its content is not what was written"):
        files.load(Host.attach(tiny.model()), tmp_path / "out")
    with pytest.raises(ValueError, match=r"is no adaptor: it has no adaptor_config\.json"):
        files.load(Host.attach(tiny.model()), tmp_path)
    facts = files.facts_of(tmp_path / "out") | {"format": 2}
    (tmp_path / "out" / files.CONFIG).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="has format 2, this version reads 1: update distilvlm"):
        files.config_of(tmp_path / "out")


def test_a_directory_of_adaptors_that_lost_a_file_and_one_of_none_are_refused(tmp_path: Path, spec: Any):
    vlm = build(spec("clip", "llama"), 0)
    with pytest.raises(ValueError, match=r"this model has no adaptors: models\.save\.save writes it"):
        hosted.save(vlm, spec("clip", "llama"), 0, tmp_path / "out", "pad")
    Host.attach(vlm.model).add("one", AdaptorConfig(positions=(1,), projector=True))
    hosted.save(vlm, spec("clip", "llama"), 0, tmp_path / "out", "pad")
    (tmp_path / "out" / hosted.PROJECTOR).unlink()
    with pytest.raises(ValueError, match=r"the adaptors are damaged:\s+\S+projector\.safetensors: missing"):
        hosted.load(tmp_path / "out")


class Packed(nn.Module):
    """A linear layer in 8 bits, as quantisers hold it: integers, a scale for each row, nothing that could train."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.weight * self.scale, self.bias)


def quantised(kind: str, head: bool = False) -> Any:
    model = tiny.model(kind)
    for module in [*model.model.layers.modules(), *([model] if head else [])]:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Packed(child))
    model.config.quantization_config = {"quant_method": "packed"}
    return model


@pytest.mark.parametrize("as_files", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_an_adaptor_of_a_quantised_base_comes_from_full_precision(tmp_path: Path, as_files: bool, head: bool):
    host, whole, given = Host.attach(quantised("llama", head)), tiny.model("llama"), tiny.ids()
    with pytest.raises(ValueError, match=r"model\.layers\.0 is quantised \(LlamaDecoderLayer\).*full_precision"):
        host.add("one", AdaptorConfig(positions=tiny.PLACES))
    assert host.names == ()
    source: Any = whole.state_dict()
    if as_files:
        source = tmp_path
        save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, tmp_path / "m.safetensors")
    made = host.add("one", AdaptorConfig(positions=tiny.PLACES), full_precision=source)
    for number, position in enumerate(tiny.PLACES):
        expected = whole.model.layers[position].state_dict()
        assert all(value.equal(expected[name]) for name, value in made.layers[number].state_dict().items())
    assert made.lm_head.weight.equal(whole.lm_head.weight)
    exact = Host.attach(whole)
    exact.add("one", AdaptorConfig(positions=tiny.PLACES))
    found, expected = tiny.logits(host, "one", given), tiny.logits(exact, "one", given)
    assert found.allclose(expected, atol=0.1 * float(expected.abs().max())) and not found.equal(expected)
    tiny.disturb(made.parameters())
    with host.use("one"):
        host.model(input_ids=given, labels=given).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())
    assert tiny.greedy(host, "one", given).equal(tiny.greedy(host, "one", given, use_cache=False))


def test_an_adaptor_trained_on_the_whole_base_runs_on_the_quantised_one_when_that_is_accepted(tmp_path: Path):
    host, given = tiny.host("llama", one=AdaptorConfig(positions=(1, 3))), tiny.ids()
    files.save(host, "one", tmp_path / "out")
    small = Host.attach(quantised("llama"))
    with pytest.raises(ValueError, match="or say accept_other_weights=True"):
        files.load(small, tmp_path / "out")
    files.load(small, tmp_path / "out", accept_other_weights=True)
    expected = tiny.logits(host, "one", given)
    assert tiny.logits(small, "one", given).allclose(expected, atol=0.1 * float(expected.abs().max()))


def test_full_precision_that_lacks_a_layer_is_told(tmp_path: Path):
    host, state = Host.attach(quantised("llama")), tiny.model("llama").state_dict()
    del state["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*model\.layers\.2\.mlp\.up_proj\.weight"):
        host.add("one", AdaptorConfig(positions=(2,)), full_precision=state)
    with pytest.raises(NotHere):
        host.add("one", AdaptorConfig(positions=(2,)), full_precision=tmp_path / "nowhere")
    (tmp_path / "m.bin").touch()
    with pytest.raises(ValueError, match="convert them to safetensors"):
        host.add("one", AdaptorConfig(positions=(2,)), full_precision=tmp_path)


def test_a_host_without_weights_takes_adaptors_for_a_plan():
    with torch.device("meta"):
        model = tiny.HOSTS["llama-tied"]()
    host = Host.attach(model)
    host.add("one", AdaptorConfig(positions=(0, 3), structure="a"))
    real = tiny.host("llama-tied", one=AdaptorConfig(positions=(0, 3), structure="a"))
    assert all(parameter.is_meta for parameter in host["one"].parameters())
    assert host.bytes("one") == real.bytes("one")


POSITIONS = [0, 1]  # of the published ones, what a host of two layers reaches


def checkpoint(place: Path, vlm: Any, inserted: int = 2) -> tuple[Path, Host]:
    """A directory in the method's layout, and the host that it should become; it has layers that lie dead, too."""
    host = Host.attach(copy.deepcopy(vlm.model))
    named = {name.replace("image_tower.image_tower", "vision_tower.vision_tower"): v for name, v in theirs(vlm).items()}
    tensors = {name.replace("mm_projector.image_spatial_proj", "mm_projector"): value for name, value in named.items()}
    del tensors["model.layers.0.self_attn.rotary_emb.inv_freq"]
    for number, (name, mark, letter) in enumerate((("multimodal", "", ""), ("grounding", "_grounding", "_G"))):
        made = host.add(name, AdaptorConfig(positions=tuple(POSITIONS), projector=True))
        tiny.disturb(made.parameters(), number)
        for key, value in made.state_dict().items():
            kind, _, rest = key.partition(".")
            table = {
                "layers": f"model.condition_layers{mark}.{rest}",
                "embed_tokens": f"model.embed_tokens_condition{mark}.{rest}",
                "norm": f"model.norm_condition{mark}.{rest}",
                "lm_head": f"lm_head_condtion{mark}.{rest}",
                "projector": f"model.mm_projector{letter}.{0 if 'linear_1' in key else 2}.{rest.rpartition('.')[2]}",
            }
            tensors[table[kind]] = value.clone()
        for dead in range(2, inserted):
            for key in made.layers[0].state_dict():
                tensors[f"model.condition_layers{mark}.{dead}.{key}"] = torch.ones(1)
    place.mkdir(parents=True)
    text = vlm.model.config.get_text_config()
    numbers = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    facts = {name: getattr(text, name) for name in (*numbers, "num_key_value_heads", "rms_norm_eps")}
    facts |= {"model_type": "IAA", "tie_word_embeddings": False, "mm_vision_tower": str(place.parent / "clip")}
    facts |= {"mm_vision_select_layer": vlm.layout.layer, "mm_vision_select_feature": "patch"}
    (place / "config.json").write_text(json.dumps(facts | {"image_aspect_ratio": "pad"}))
    halves = list(tensors)[::2], list(tensors)[1::2]
    for number, names in enumerate(halves, 1):
        save_file(
            {name: tensors[name].contiguous() for name in names}, place / f"model-0000{number}-of-00002.safetensors"
        )
    vlm.tokenizer.save_pretrained(place)
    vlm.model.model.vision_tower.save_pretrained(place.parent / "clip")
    return place, host


@pytest.mark.parametrize("inserted", [2, 14])
def test_published_checkpoints_become_a_stock_model_and_two_adaptors(tmp_path: Path, make, inserted: int):
    vlm, given = make("clip", "llama"), tiny.ids() % 29
    place, expected = checkpoint(tmp_path / "theirs", vlm, inserted)
    found, geometry = published.read(place)
    host = Host.of(found.model)
    assert host is not None and geometry == "pad"
    assert host.names == ("multimodal", "grounding")
    for workflow in ("text", *host.names):
        assert tiny.logits(host, workflow, given).equal(tiny.logits(expected, workflow, given))
        if workflow != "text":
            assert host[workflow].config == expected[workflow].config
            assert all(
                value.equal(expected[workflow].state_dict()[name])
                for name, value in host[workflow].state_dict().items()
            )


def test_published_checkpoints_of_other_forms_are_refused(tmp_path: Path, make):
    vlm = make("clip", "llama")
    with pytest.raises(NotHere):
        published.read(tmp_path)
    place, _ = checkpoint(tmp_path / "three" / "theirs", vlm, inserted=3)
    with pytest.raises(
        ValueError, match=r"'multimodal' has 3 inserted layers, .* 2 positions below 2: say behind which"
    ):
        published.read(place)
    place, _ = checkpoint(tmp_path / "two" / "theirs", vlm)
    with pytest.raises(ValueError, match="has 2 inserted layers, 1 positions are given"):
        published.read(place, positions=[1])
    assert Host.of(published.read(place, positions=[0, 1])[0].model) is not None
    first = place / "model-00001-of-00002.safetensors"
    content = load_file(first)
    lost = next(name for name in content if "condition_layers_grounding" in name)
    save_file({name: value for name, value in content.items() if name != lost}, first)
    ours = lost.replace("model.condition_layers_grounding", "layers")
    with pytest.raises(ValueError, match=rf"grounding: the adaptor lacks 1 tensors .*{ours}"):
        published.read(place)
    plain = {name: value for name, value in content.items() if "condition" not in name and "condtion" not in name}
    for file in place.glob("*.safetensors"):
        save_file(plain, file)
    with pytest.raises(ValueError, match="has no inserted layers"):
        published.read(place)


def test_the_converter_leaves_a_base_and_adaptors_that_are_one_model(
    tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    vlm, given = make("clip", "llama"), tiny.ids() % 29
    place, expected = checkpoint(tmp_path / "theirs", vlm)
    assert command(monkeypatch, "convert-checkpoint", "iaa", place, tmp_path / "out") == 0
    assert "adaptors/grounding: behind layers 0, 1" in capsys.readouterr().out
    model = load(tmp_path / "out" / "adaptors")
    assert model.host is not None and model.adaptors == ("multimodal", "grounding")
    for workflow in ("text", *model.adaptors):
        assert tiny.logits(model.host, workflow, given).equal(tiny.logits(expected, workflow, given))
    assert command(monkeypatch, "convert-checkpoint", "iaa", place, tmp_path / "out") == 1
    assert command(monkeypatch, "convert-checkpoint", "iaa", place, tmp_path / "o", "--positions", "0") == 1
    assert "has 2 inserted layers, 1 positions are given" in capsys.readouterr().err
