"""Composing a VLM: the parts' own weights, randomness of its own, and plans that weigh nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
    SiglipModel,
)

from distilvlm.models import parts
from distilvlm.models.compose import build
from distilvlm.models.save import save
from distilvlm.models.sources import NotHere, drawn
from distilvlm.recipe.models import ModelSpec

VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = VIT | {"vocab_size": 30, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PIXELS = {"image_size": 12, "patch_size": 4}
LM = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 40}


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer_directory):
    """Pretrained parts on disk: towers, and bf16 language models with their tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VIT | PIXELS)).save_pretrained(root / "clip")
    SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VIT | PIXELS)).save_pretrained(root / "siglip")
    AutoModel.from_config(Dinov2Config(**VIT, **PIXELS)).save_pretrained(root / "dinov2")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    for name, config in {
        "llama": LlamaConfig(**LM, tie_word_embeddings=True),
        "qwen2": Qwen2Config(**LM, num_key_value_heads=2),
        "qwen3": Qwen3Config(**LM, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    }.items():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "siglip" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    return root


def composed(checkpoints, vision="clip", language="llama", **language_fields):
    return ModelSpec.model_validate(
        {
            "vision": {"from": str(checkpoints / vision)},
            "language": {"from": str(checkpoints / language), **language_fields},
        }
    )


@pytest.mark.parametrize(("vision", "language"), [("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "qwen3")])
def test_pretrained_parts_keep_their_function_in_float32(checkpoints, vision, language):
    vlm = build(composed(checkpoints, vision, language), seed=0)
    assert {p.dtype for p in vlm.model.parameters()} == {torch.float32}
    ids = torch.randint(0, 40, (2, 7))
    pixels = torch.randn(2, 3, 12, 12)
    lm = AutoModelForCausalLM.from_pretrained(checkpoints / language, dtype=torch.float32)
    tower = AutoModel.from_pretrained(checkpoints / vision)
    tower = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        assert torch.equal(vlm.model(input_ids=ids).logits, lm(ids).logits)
        assert torch.equal(vlm.model.model.vision_tower(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    assert parts.head_is_tied(vlm.model) == lm.config.tie_word_embeddings


def test_pixel_statistics_are_the_checkpoints_own_or_the_familys(checkpoints):
    assert build(composed(checkpoints, "siglip"), 0).layout.mean == (0.1, 0.2, 0.3)
    assert build(composed(checkpoints, "siglip"), 0).layout.std == (0.4, 0.5, 0.6)
    assert build(composed(checkpoints, "clip"), 0).layout.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    assert build(composed(checkpoints, "dinov2"), 0).layout.std == (0.229, 0.224, 0.225)


def test_a_cut_language_model_has_the_kept_layers_weights(checkpoints):
    whole = build(composed(checkpoints, language="qwen3"), 0).model.model.language_model
    short = build(composed(checkpoints, language="qwen3", layers=[0, 3]), 0).model
    assert short.config.text_config.num_hidden_layers == 2
    for kept, original in zip(short.model.language_model.layers, (whole.layers[0], whole.layers[3]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), original.parameters(), strict=True))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "lacks 1 tensors"),
        (lambda tensors: tensors.update({"model.layers.9.extra": torch.zeros(1)}), "has unknown 1 tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_to_the_last_tensor_is_refused(checkpoints, tmp_path, damage, message):
    for file in (checkpoints / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = ModelSpec.model_validate(
        {"vision": {"from": str(checkpoints / "clip")}, "language": {"from": str(tmp_path)}}
    )
    with pytest.raises(ValueError, match=message):
        build(spec, 0)


def test_buffers_that_older_checkpoints_carry_are_no_misfit(checkpoints, tmp_path):
    for file in (checkpoints / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = ModelSpec.model_validate(
        {"vision": {"from": str(checkpoints / "clip")}, "language": {"from": str(tmp_path)}}
    )
    expected = build(composed(checkpoints), 0).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in build(spec, 0).model.state_dict().items())


def test_a_pickled_checkpoint_is_refused_by_name(checkpoints, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoints / "dinov2" / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    spec = ModelSpec.model_validate(
        {"vision": {"from": str(tmp_path)}, "language": {"from": str(checkpoints / "llama")}}
    )
    with pytest.raises(ValueError, match=r"pickled file, pytorch_model\.bin"):
        build(spec, 0)


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_stays_put(spec, checkpoints):
    for which in (spec("siglip", "qwen3"), composed(checkpoints)):
        before = torch.get_rng_state()
        first = bits(build(which, 7).model)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(99)
        again = bits(build(which, 7).model)
        assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_another_seed_changes_every_random_part(spec):
    first, second = (build(spec("dinov2", "qwen2-tied"), seed).model for seed in (1, 2))
    for part in ("vision", "projector", "language"):
        pairs = zip(*(parts.parameters_of(m, part).values() for m in (first, second)), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)


def test_parts_are_drawn_independently_of_each_other(spec):
    base = build(spec("clip", "llama"), 3).model
    other_tower = build(spec("siglip", "llama"), 3).model
    other_projector = build(spec("clip", "llama", projector={"init_std": 0.5}), 3).model
    for part, other in (("language", other_tower), ("language", other_projector), ("vision", other_projector)):
        expected, found = parts.parameters_of(base, part), parts.parameters_of(other, part)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_no_two_parts_are_drawn_alike():
    draws = []
    for part in ("vision", "language", "projector"):
        with drawn(0, part):
            draws.append(torch.randn(4).tolist())
    assert len({tuple(draw) for draw in draws}) == 3


def test_the_projector_starts_as_published(spec):
    vlm = build(spec("clip", "llama", projector={"init_std": 0.02}), 0)
    projector = vlm.model.model.multi_modal_projector
    weights = torch.cat([projector.linear_1.weight.flatten(), projector.linear_2.weight.flatten()])
    assert weights.std().item() == pytest.approx(0.02, rel=0.1) and abs(weights.mean().item()) < 0.002
    assert not projector.linear_1.bias.any() and not projector.linear_2.bias.any()


@pytest.mark.parametrize("language", ["llama", "llama-tied"])  # with a spare row for <image>, and without
def test_a_saved_model_is_built_again_whole_or_as_a_plan(make, tmp_path, language):
    vlm = make("dinov2-registers", language)
    save(vlm, tmp_path / "model", "square")
    spec = ModelSpec.model_validate({"from": str(tmp_path / "model")})
    again, plan = build(spec, 1), build(spec, 1, meta=True)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in bits(vlm.model).items())
    assert again.layout == vlm.layout == plan.layout
    assert again.image_id == vlm.image_id == plan.image_id
    assert parts.summary(plan.model) == parts.summary(again.model) == parts.summary(vlm.model)


def test_an_unknown_key_of_an_architecture_names_the_nearest(make):
    told = r"language\.config\.num_hiden_layers.* is unknown to 'llama'.*; did you mean 'num_hidden_layers'\?"
    with pytest.raises(ValueError, match=told):
        make("clip", "llama", language_config={"num_hiden_layers": 3})
    with pytest.raises(ValueError, match=r"vision\.config\.model_type 'clap_vision'"):
        make("clip", "llama", config={"model_type": "clap_vision"})
    with pytest.raises(ValueError, match=r"vision\.config needs 'model_type' \(llama, qwen2, dinov2, \.\.\.\)"):
        make("clip", "llama", config={"hidden_size": 16})


def test_a_directory_that_is_not_there_is_named_and_its_run_too(tmp_path, checkpoints):
    missing = tmp_path / "runs" / "teacher" / "model"
    for meta in (False, True):
        with pytest.raises(NotHere, match=r"make that first.*--dir .*runs/teacher\)") as caught:
            build(ModelSpec.model_validate({"from": str(missing)}), 0, meta=meta)
        assert caught.value.path == missing
        with pytest.raises(NotHere, match="nowhere"):
            build(composed(checkpoints, vision="nowhere"), 0, meta=meta)


@pytest.mark.parametrize(("vision", "language"), [("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "qwen3")])
def test_a_plan_has_the_same_parts_as_the_model(checkpoints, vision, language):
    which = composed(checkpoints, vision, language, layers=2)
    plan, vlm = build(which, 0, meta=True), build(which, 0)
    assert {p.device.type for p in plan.model.parameters()} == {"meta"}
    assert parts.summary(plan.model) == parts.summary(vlm.model)
    assert plan.layout == vlm.layout and plan.image_id == vlm.image_id
    assert parts.choose(plan.model, ["projector"]).table == parts.choose(vlm.model, ["projector"]).table
