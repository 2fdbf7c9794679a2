"""Checkpoints in the layout of LLaVA-MoD's own repository become stock ones of the same function."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, silu
from transformers import AutoModelForImageTextToText, AutoTokenizer

from distilvlm.models.llava_mod import load
from distilvlm.models.save import geometry_of, save
from distilvlm.models.save import load as load_stock
from distilvlm.models.sources import NotHere
from distilvlm.models.upcycling import upcycle, upcycled_layers

KINDS = {"qwen2-tied": "qwen2", "llama": "llama"}
ROWS = ["a#bcde", "fg#h"]


def sparse_twin(vlm, experts=4):
    """Upcycled, and as if trained: experts differ, routers tell tokens apart."""
    sparse = upcycle(vlm, experts, 2, [0])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sparse.model.named_parameters():
            if ".mlp.experts." in name or ".mlp.gate." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return sparse


def theirs(vlm) -> dict[str, torch.Tensor]:
    """The weights of a model of ours under the names of their repository."""
    named: dict[str, torch.Tensor] = {}
    mark = getattr(vlm.model.config.get_text_config(), "upcycled", {"from": "dense"})
    of_the_twin = r"\.shared_expert|language_model.*_proj\.bias" if mark["from"] == "llama" else r"\.shared_expert"
    for name, value in vlm.model.state_dict().items():
        if re.search(of_the_twin, name):  # zeros
            continue
        name = name.replace("model.language_model.", "model.")
        name = name.replace("model.vision_tower.", "model.image_tower.image_tower.vision_model.")
        if "multi_modal_projector" in name:
            layer = 2 * (int(name.split("linear_")[1][0]) - 1)
            name = f"model.mm_projector.image_spatial_proj.{layer}.{name.rpartition('.')[2]}"
        if name.endswith("mlp.gate.weight"):
            name = name.replace("mlp.gate.weight", "mlp.deepspeed_moe.gate.wg.weight")
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    named[expert_name(name, expert, part)] = half.clone()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                named[expert_name(name, expert, "down")] = down.clone()
        else:
            named[name] = value.clone()
    named["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)  # of older versions of transformers
    return named


def expert_name(name: str, expert: int, part: str) -> str:
    block = name.partition("experts.")[0]
    return f"{block}deepspeed_moe.experts.deepspeed_experts.{expert}.{part}_proj.weight"


def write(place: Path, vlm, kind: str, tensors=None, pickled=True, **changes) -> Path:
    """A directory as their code leaves it: named without 'moe', with the configuration of a class of theirs."""
    place.mkdir(parents=True)
    text = vlm.model.config.get_text_config()
    numbers = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    numbers = (*numbers, "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "eos_token_id", "hidden_act")
    layers = upcycled_layers(vlm.model.config)
    facts = {
        **{name: getattr(text, name) for name in numbers},
        "architectures": ["LLaVAMoDQwen2ForCausalLMFineTune"],
        "model_type": f"{'moe_' if layers else ''}llava_{kind}",
        "rope_theta": text.rope_parameters["rope_theta"],
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "mm_image_tower": str(place.parent / "clip"),
        "mm_vision_select_layer": vlm.layout.layer,
        "mm_vision_select_feature": "patch",
        "image_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 16,
        **changes,
    }
    if layers:
        facts["moe"] = {"moe_layers_idx": layers, "num_experts": [4], "top_k_experts": 2, "use_residual": False}
    (place / "config.json").write_text(json.dumps(facts))
    tensors = theirs(vlm) if tensors is None else tensors
    if pickled:
        half = len(tensors) // 2
        for number, names in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
            torch.save({name: tensors[name] for name in names}, place / f"pytorch_model-0000{number}-of-00002.bin")
        torch.save({"lr": 2e-5}, place / "training_args.bin")
    else:
        save_file(tensors, place / "model.safetensors")
    vlm.tokenizer.save_pretrained(place)
    vlm.model.model.vision_tower.save_pretrained(place.parent / "clip")
    return place


@pytest.fixture
def changed(make):
    """changed(language, sparse) → a model; another rope than the default, so that forgetting it shows."""

    def build(language="qwen2-tied", sparse=True, **facts):
        rope = {"rope_type": "default", "rope_theta": 777.0}
        dense = make("clip", language, language_config={"rope_parameters": rope, **facts})
        return sparse_twin(dense) if sparse else dense

    return build


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("language", list(KINDS))
def test_converted_logits_are_ours(
    changed, make_batch, stock_logits, tmp_path, language: str, sparse: bool, pickled: bool
) -> None:
    ours = changed(language, sparse)
    place = write(tmp_path / "llavaqwen-2-0.5b-d2s", ours, KINDS[language], pickled=pickled)
    converted, geometry = load(place)
    assert geometry == "pad"
    save(converted, tmp_path / "stock", geometry)
    assert geometry_of(tmp_path / "stock") == "pad"
    again = load_stock(tmp_path / "stock")
    batch = make_batch(ours, ROWS)
    assert upcycled_layers(again.model.config) == ([0] if sparse else [])
    assert again.image_id == ours.image_id and again.layout == ours.layout
    torch.testing.assert_close(stock_logits(again, batch), stock_logits(ours, batch), atol=1e-6, rtol=0)


def test_a_sparse_layer_is_deepspeeds_gate_over_their_experts(changed, tmp_path) -> None:
    """From the tensors as they are named there: softmax over all, two best, renormalised, their outputs added up."""
    ours = changed()
    tensors = theirs(ours)
    converted, _ = load(write(tmp_path / "theirs", ours, "qwen2", tensors))
    hidden = torch.randn(1, 11, 24, generator=torch.Generator().manual_seed(5))
    here = "model.layers.0.mlp.deepspeed_moe."
    chances = linear(hidden[0], tensors[f"{here}gate.wg.weight"]).softmax(-1)
    expected = torch.zeros(11, 24)
    for token, row in enumerate(chances):
        best = row.topk(2).indices.tolist()
        for expert in best:
            gate, up, down = (
                tensors[f"{here}experts.deepspeed_experts.{expert}.{part}_proj.weight"]
                for part in ("gate", "up", "down")
            )
            x = hidden[0, token]
            expected[token] += row[expert] / row[best].sum() * (down @ (silu(gate @ x) * (up @ x)))
    with torch.no_grad():
        found = converted.model.model.language_model.layers[0].mlp(hidden)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_first_expert_alone_is_not_renormalised(changed, tmp_path) -> None:
    """DeepSpeed's top-1 gate: the weight is the probability, which a stock block does without norm_topk_prob."""
    ours = changed()
    place = write(tmp_path / "theirs", ours, "qwen2")
    facts = json.loads((place / "config.json").read_text())
    facts["moe"]["top_k_experts"] = 1
    (place / "config.json").write_text(json.dumps(facts))
    text = load(place)[0].model.config.get_text_config()
    assert (text.num_experts_per_tok, text.norm_topk_prob) == (1, False)


def test_a_tower_that_was_not_saved_is_read_from_the_encoder(changed, make_batch, stock_logits, tmp_path) -> None:
    ours = changed()
    tensors = {name: value for name, value in theirs(ours).items() if "image_tower" not in name}
    place = write(tmp_path / "theirs", ours, "qwen2", tensors, mm_image_tower="nowhere/clip")
    shutil.copytree(tmp_path / "clip", tmp_path / "elsewhere")
    converted, _ = load(place, str(tmp_path / "elsewhere"))
    batch = make_batch(ours, ROWS)
    torch.testing.assert_close(stock_logits(converted, batch), stock_logits(ours, batch), atol=1e-6, rtol=0)


def test_dtypes_stay_and_a_stranger_loads_the_widest(changed, tmp_path) -> None:
    ours = changed()
    tensors = {n: value if "wg" in n or "image_tower" in n else value.bfloat16() for n, value in theirs(ours).items()}
    converted, geometry = load(write(tmp_path / "theirs", ours, "qwen2", tensors))
    body = converted.model.model.language_model
    assert body.layers[0].mlp.gate.weight.dtype == torch.float32
    assert body.layers[0].mlp.experts.down_proj.dtype == body.embed_tokens.weight.dtype == torch.bfloat16
    save(converted, tmp_path / "stock", geometry)
    stranger = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock")
    assert {parameter.dtype for parameter in stranger.parameters()} == {torch.float32}
    assert torch.equal(
        stranger.model.language_model.layers[0].mlp.gate.weight,
        tensors["model.layers.0.mlp.deepspeed_moe.gate.wg.weight"],
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "stock").convert_tokens_to_ids("<image>") == ours.image_id


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_one(name: str, *shape: int):
    return lambda tensors: {**tensors, name: torch.zeros(shape)}


EXPERT = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts"
DAMAGES = {
    "a router is missing": (without("model.layers.0.mlp.deepspeed_moe.gate.wg.weight"), "lacks.*mlp.gate.weight"),
    "an expert is missing": (without(f"{EXPERT}.1.up_proj.weight"), "lacks.*experts.gate_up_proj"),
    "a bias is missing": (without("model.layers.1.self_attn.k_proj.bias"), "lacks.*k_proj.bias"),
    "a projector layer is missing": (without("model.mm_projector.image_spatial_proj.2.bias"), "lacks.*linear_2.bias"),
    "one too many": (with_one("model.layers.1.mlp.up_proj.bias", 32), "unknown.*up_proj.bias"),
    "another shape": (with_one("model.norm.weight", 23), "another shape.*norm.weight"),
    "residual experts": (
        with_one("model.layers.0.mlp.mlp.up_proj.weight", 32, 24),
        r"use_residual.*, which a stock Llava cannot hold \(tensor 'm",
    ),
    "another projector": (with_one("model.mm_projector.image_spatial_proj.weight", 24, 16), "mlp2x_gelu"),
    "adapters": (with_one("model.layers.0.self_attn.q_proj.lora_A.weight", 2, 24), "LoRA"),
    "the embedding is missing": (without("model.embed_tokens.weight"), r"theirs lacks model\.embed_tokens\.weight"),
    "a head of its own": (with_one("lm_head.weight", 40, 24), "differs from the embedding"),
}


@pytest.mark.parametrize("damage, told", DAMAGES.values(), ids=DAMAGES)
def test_what_is_missing_left_over_or_impossible_is_named(changed, tmp_path, damage, told: str) -> None:
    ours = changed()
    place = write(tmp_path / "theirs", ours, "qwen2", damage(theirs(ours)))
    with pytest.raises(ValueError, match=told):
        load(place)


def test_a_head_that_is_neither_there_nor_tied_is_told(changed, tmp_path) -> None:
    ours = changed("llama", False)
    place = write(tmp_path / "theirs", ours, "llama", without("lm_head.weight")(theirs(ours)))
    with pytest.raises(
        ValueError, match=r"lacks lm_head\.weight, and its config\.json does not tie it to the embedding"
    ):
        load(place)


def test_other_configurations_are_refused_by_field(changed, tmp_path) -> None:
    ours = changed()
    with pytest.raises(ValueError, match=r"model_type 'moe_llava_gemma2'"):
        load(write(tmp_path / "a" / "theirs", ours, "gemma2"))
    place = write(tmp_path / "b" / "theirs", ours, "qwen2")
    facts = json.loads((place / "config.json").read_text())
    del facts["moe"]
    (place / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"moe\.top_k_experts is None"):
        load(place)
    with pytest.raises(NotHere):
        load(tmp_path / "nowhere")


def test_a_pickle_that_would_run_something_is_not_run(changed, tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    place = write(tmp_path / "theirs", changed(), "qwen2")
    torch.save({"x": Evil()}, place / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        load(place)
    assert not (tmp_path / "ran").exists()
