"""Upcycling: the sparse model is the dense one until something trains, and what comes of it is a stock checkpoint."""

import copy
import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distilvlm.models import forward, parts, routing
from distilvlm.models.architectures import published
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.save import load, save
from distilvlm.models.upcycling import active_parameters, chosen_layers, upcycle, upcycled_layers
from distilvlm.recipe.schema import OptimSpec
from distilvlm.train.optim import adamw

FACTS = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ALONE = {
    "llama": (LlamaForCausalLM, LlamaConfig(**FACTS)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**FACTS, tie_word_embeddings=True)),
    "llama-3": (LlamaForCausalLM, LlamaConfig(**FACTS, rope_parameters=LLAMA3, rms_norm_eps=1e-3)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**FACTS, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config(**FACTS, tie_word_embeddings=True)),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config(**FACTS, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    ),
}
IN_A_VLM = {
    "llama": ("llama", {}),
    "llama-tied": ("llama-tied", {}),
    "qwen2": ("qwen2-tied", {"tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2-tied", {}),
}


def alone(name, dtype=torch.float32):
    torch.manual_seed(0)
    kind, config = ALONE[name]
    model = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    # `from_pretrained` casts weights only; the frequencies of positions stay in fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def in_a_vlm(make, name):
    language, facts = IN_A_VLM[name]
    return make("clip", language, language_config=facts)


@torch.no_grad()
def logits(model, **inputs):
    return model.eval()(**inputs).logits.float()


def texts(model):
    """Right-padded ids of two lengths."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, model.config.vocab_size, (2, 40), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def close(found, expected, dtype):
    """In bf16 the weights of two experts are rounded each, and so is their sum."""
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALONE)
def test_a_sparse_language_model_is_the_dense_one(name, dtype):
    dense = alone(name, dtype)
    sparse = upcycle(dense)
    assert type(sparse).__name__ == "Qwen2MoeForCausalLM"
    assert {parameter.dtype for parameter in sparse.parameters()} == {dtype}
    inputs = texts(dense)
    close(logits(sparse, **inputs), logits(dense, **inputs), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", IN_A_VLM)
def test_a_sparse_vlm_is_the_dense_one(make, make_batch, stock_logits, name, dtype):
    dense = in_a_vlm(make, name)
    for parameter in dense.model.parameters():
        parameter.data = parameter.data.to(dtype)
    sparse = upcycle(dense, layers="all", experts=3)
    assert isinstance(sparse.model, LlavaForConditionalGeneration)
    assert (sparse.layout, sparse.image_id, sparse.tokenizer) == (dense.layout, dense.image_id, dense.tokenizer)
    batch = make_batch(dense, ["a#bc", "#d", "ef"])
    with torch.no_grad():
        features = forward.vision_features(dense.model, dense.layout, batch.pictures)
        found, expected = (
            forward.hidden_states(vlm.model.eval(), vlm.layout, batch, features).float()
            @ forward.head_weight(vlm.model).float().T
            for vlm in (sparse, dense)
        )
    close(found, expected, dtype)
    if dtype == torch.float32:
        close(stock_logits(sparse, batch), stock_logits(dense, batch), dtype)


def test_with_any_number_of_experts_and_choices():
    dense = alone("qwen2")
    for experts, top_k in ((2, 1), (2, 2), (8, 3)):
        sparse = upcycle(dense, experts=experts, top_k=top_k)
        close(logits(sparse, **texts(dense)), logits(dense, **texts(dense)), torch.float32)
        assert sparse.config.num_experts == experts and sparse.config.num_experts_per_tok == top_k
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k is {top_k}: it must be from 1 to the number of experts, 4"):
            upcycle(dense, top_k=top_k)


def test_training_mode_is_the_dense_one_too_while_experts_are_equal():
    """Whoever serves a token, and even where one of two experts is full."""
    dense = alone("llama")
    sparse = upcycle(dense, layers="all")
    routing.install(sparse, "gumbel", None)
    with torch.no_grad():
        found = sparse.train()(**texts(dense)).logits
    close(found, logits(dense, **texts(dense)), torch.float32)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("even", [0, 2, 4]),
        ("odd", [1, 3]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ([4, 1], [1, 4]),
    ],
)
def test_which_layers_become_sparse(layers, expected):
    assert chosen_layers(5, layers) == expected


@pytest.mark.parametrize("layers", ["even", "odd", [3, 0]])
def test_the_chosen_layers_are_sparse_and_no_others(layers):
    sparse = upcycle(alone("qwen2-tied"), layers=layers)
    found = [
        index for index, layer in enumerate(sparse.model.layers) if type(layer.mlp).__name__ == "Qwen2MoeSparseMoeBlock"
    ]
    assert found == chosen_layers(4, layers) == upcycled_layers(sparse.config)
    assert len(routing.routers(sparse)) == 2


@pytest.mark.parametrize("layers", [[], [4], [-1], [1, 1], "some"])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="layers: "):
        upcycle(alone("llama"), layers=layers)


def test_experts_are_copies_and_everything_else_is_shared_and_as_it_was():
    dense = alone("qwen2")
    before = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in dense.named_parameters()}
    facts, state = copy.deepcopy(dense.config.to_dict()), torch.random.get_rng_state()
    dense.model.layers[1].requires_grad_(False)
    sparse = upcycle(dense)
    assert torch.equal(torch.random.get_rng_state(), state) and dense.config.to_dict() == facts and not dense.training
    after = dict(dense.named_parameters())
    for name, (identity, trains, value) in before.items():
        assert id(after[name]) == identity and torch.equal(after[name], value)
        assert after[name].requires_grad == (trains and ".layers.1." not in name)
    ours = dict(sparse.named_parameters())
    for name, parameter in after.items():
        if (".layers.0.mlp" in name) or (".layers.2.mlp" in name):
            continue
        assert ours[name].data_ptr() == parameter.data_ptr() and ours[name].requires_grad
    experts, feed_forward = sparse.model.layers[2].mlp.experts, dense.model.layers[2].mlp
    for expert in range(4):
        gate, up = experts.gate_up_proj[expert].chunk(2)
        assert torch.equal(gate, feed_forward.gate_proj.weight) and torch.equal(up, feed_forward.up_proj.weight)
        assert torch.equal(experts.down_proj[expert], feed_forward.down_proj.weight)
    with torch.no_grad():
        experts.down_proj[0].zero_()  # experts are four tensors, and none is the dense one
    assert feed_forward.down_proj.weight.any() and experts.down_proj[1].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_dense_model_is_left_behind(make, checkpointing):
    """Its feed-forwards are gigabytes, and the tower that both share must not hold them."""
    dense = make("clip", "llama")
    if checkpointing:
        forward.enable_gradient_checkpointing(dense.model)
    model, weight = (weakref.ref(one) for one in (dense.model, dense.model.model.language_model.layers[0].mlp))
    gc.disable()
    try:
        sparse = upcycle(dense)
        del dense
        assert model() is None and weight() is None and sparse.model is not None
    finally:
        gc.enable()


def test_the_same_seed_gives_the_same_bits_and_routers_as_linear_layers_begin():
    def weights(seed):
        torch.rand(3)  # nothing depends on the global generator
        return [gate.weight.detach() for gate in routing.routers(upcycle(alone("llama"), layers="all", seed=seed))]

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])
    drawn = torch.cat([weight.flatten() for weight in first])  # 512 of U(-b, b)
    bound = 32**-0.5
    assert 0.95 * bound < drawn.abs().max() <= bound
    assert abs(drawn.mean()) < 0.1 * bound and abs(drawn.std() - bound / 3**0.5) < 0.1 * bound


def small(kind, config, **changes):
    return kind(config(**(FACTS | changes)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: small(Qwen3ForCausalLM, Qwen3Config, head_dim=8),
            "a 'qwen3' cannot become sparse.*normalises queries",
        ),
        (lambda: upcycle(alone("qwen2")), "is sparse already"),
        (
            lambda: small(LlamaForCausalLM, LlamaConfig, mlp_bias=True),
            "this llama cannot become sparse as a stock Qwen2Moe: its feed",
        ),
        (lambda: small(LlamaForCausalLM, LlamaConfig, attention_bias=True), "its attention's output has a bias"),
        (lambda: small(Qwen2ForCausalLM, Qwen2Config, hidden_act="gelu"), "activation is gelu, not silu"),
        (lambda: small(LlamaForCausalLM, LlamaConfig, head_dim=16), "its heads are 16 wide"),
    ],
    ids=["qwen3", "sparse", "mlp_bias", "attention_bias", "gelu", "head_dim"],
)
def test_what_qwen2moe_cannot_hold_is_refused_with_the_reason(model, reason):
    with pytest.raises(ValueError, match=reason):
        upcycle(model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_function_is_refused_in_any_precision(monkeypatch, dtype):
    """As a transformers in which gate and up stand the other way round would give."""
    expanded = upcycle.__globals__["_expanded"]

    def other_way_round(*arguments):
        state = expanded(*arguments)
        for name in state:
            if name.endswith("gate_up_proj"):
                state[name] = torch.cat(state[name].chunk(2, 1)[::-1], 1)
        return state

    monkeypatch.setitem(upcycle.__globals__, "_expanded", other_way_round)
    with pytest.raises(ValueError, match="differs from the dense one by"):
        upcycle(alone("qwen2", dtype))


# What becomes of it


@pytest.mark.parametrize(
    ("source", "total", "active", "trains"),
    [
        ("Qwen/Qwen1.5-0.5B", 775.5, 567.8, 521.2),
        ("Qwen/Qwen1.5-1.8B", 3054, 2243, 2035),
        ("Qwen/Qwen2-0.5B", 964.8, 651.0, 786.2),
        ("Qwen/Qwen2-1.5B", 3278, 2122, 2894),
    ],
)
def test_parameters_are_those_of_the_specification(source, total, active, trains):
    """In millions, of the language model (§1.5): without the shared experts of zeros."""
    with torch.device("meta"):
        vision = published("openai/clip-vit-large-patch14-336")
        whole = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=published(source)))
        dense = Qwen2ForCausalLM(published(source))
    found = [round(number / 1e6, 1 if total < 1000 else 0) for number in active_parameters(upcycle(dense))]
    assert found == [total, active]
    chosen = parts.choose(upcycle(whole), ["projector", "language.feed_forward", "language.router"])
    number = sum(p.numel() for members in chosen.parameters.values() for p in members.values())
    assert round(number / 1e6, 1 if trains < 1000 else 0) == trains


def test_a_dense_model_is_active_as_a_whole():
    dense = alone("llama-tied")
    number = sum(parameter.numel() for parameter in dense.parameters())
    assert active_parameters(dense) == (number, number)


def test_the_parts_of_a_sparse_model(make):
    model = upcycle(make("clip", "qwen2-tied")).model
    router = parts.parameters_of(model, "language.router")
    assert list(router) == ["model.language_model.layers.0.mlp.gate.weight"]
    feed_forward = parts.parameters_of(model, "language.feed_forward")
    assert {name.split("language_model.")[1] for name in feed_forward} == {
        "layers.0.mlp.experts.gate_up_proj",
        "layers.0.mlp.experts.down_proj",
        *(f"layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    unused = parts.by_leaf(model)["language.unused"]
    assert {name.split(".mlp.")[1] for name in unused} == {
        "shared_expert_gate.weight",
        *(f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    assert not any(parameter.any() for parameter in unused.values())
    assert sum(row.parameters for row in parts.summary(model)) == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="shared expert of zeros of an upcycled model, which must stay zero"):
        parts.choose(model, ["language.unused"])
    with pytest.raises(ValueError, match="only a sparse model has routers"):
        parts.choose(make("clip", "qwen2-tied").model, ["language.router"])


def trained(make, make_batch, name, train, steps=3):
    """A sparse VLM after some updates of AdamW with decay, and the batch that it saw."""
    vlm = upcycle(in_a_vlm(make, name), seed=4)
    routing.install(vlm.model, "gumbel", 1.5)
    optimizer = adamw(
        parts.choose(vlm.model, train).parameters, OptimSpec(lr=0.01, batch=1, updates=1, weight_decay=0.1)
    )
    batch = make_batch(vlm, ["a#bc", "#d", "ef"])
    target = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    for _ in range(steps):
        vlm.model.train()
        features = forward.vision_features(vlm.model, vlm.layout, batch.pictures)
        with routing.watched(vlm.model, batch.attention_mask.flatten().bool()):
            hidden = forward.hidden_states(vlm.model, vlm.layout, batch, features)
        (hidden - torch.randn(hidden.shape, generator=target)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    vlm.model.eval()
    return vlm, batch


@pytest.mark.parametrize("train", [["language"], ["projector", "language.feed_forward", "language.router"]])
def test_after_updates_experts_differ_and_the_shared_expert_is_bitwise_zero(make, make_batch, train):
    vlm, _ = trained(make, make_batch, "qwen2-tied", train)
    experts = vlm.model.model.language_model.layers[0].mlp.experts.down_proj
    assert not torch.equal(experts[0], experts[1])
    for name, parameter in parts.by_leaf(vlm.model)["language.unused"].items():
        assert not parameter.view(torch.int32).any(), name  # -0.0 has a bit
        assert not parameter.requires_grad
    before = upcycle(in_a_vlm(make, "qwen2-tied"), seed=4)
    changed = {
        name
        for (name, parameter), old in zip(vlm.model.named_parameters(), before.model.parameters(), strict=True)
        if not torch.equal(parameter, old)
    }
    assert changed == {n for n, p in vlm.model.named_parameters() if p.requires_grad}
    attention = parts.parameters_of(vlm.model, "language.attention").keys()
    assert bool(attention & changed) == (train == ["language"])


STRANGER = """
import json, sys
sys.modules["distilvlm"] = None  # cannot be imported
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
told = []
for place in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(place + "/model").eval()
    with torch.no_grad():
        save_file({"logits": model(**load_file(place + "/inputs")).logits}, place + "/outputs")
    block = model.model.language_model.layers[0].mlp
    zeros = [not bool(p.any()) for name, p in block.named_parameters() if "shared_expert" in name]
    told.append([type(block).__name__, type(block.gate).__name__, zeros])
print(json.dumps(told))
"""


def test_a_trained_export_is_the_trained_model_without_this_package(make, make_batch, tmp_path):
    expected = {}
    for name in IN_A_VLM:
        vlm, batch = trained(make, make_batch, name, ["projector", "language"])
        save(vlm, tmp_path / name / "model", "square")
        with torch.no_grad():
            features = forward.vision_features(vlm.model, vlm.layout, batch.pictures)
            hidden = forward.hidden_states(vlm.model, vlm.layout, batch, features)
            real = batch.attention_mask.bool()
            expected[name] = (hidden @ forward.head_weight(vlm.model).T)[real]
        ids = batch.input_ids.clone()
        ids.view(-1)[batch.placeholder_rows] = vlm.image_id
        pixels = forward.pixel_values(vlm.layout, batch.pictures)
        inputs = {"input_ids": ids, "attention_mask": batch.attention_mask, "pixel_values": pixels}
        save_file(inputs, tmp_path / name / "inputs")
    places = [str(tmp_path / name) for name in IN_A_VLM]
    done = subprocess.run([sys.executable, "-c", STRANGER, *places], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stock = ["Qwen2MoeSparseMoeBlock", "Qwen2MoeTopKRouter", [True] * 4]
    assert json.loads(done.stdout.splitlines()[-1]) == [stock] * len(IN_A_VLM)
    for name, logits_of in expected.items():
        found = load_file(tmp_path / name / "outputs")["logits"][real][:, : logits_of.shape[1]]
        assert float((found - logits_of).abs().max()) <= 1e-6 * max(1.0, float(logits_of.abs().max())), name


@pytest.mark.parametrize("name", IN_A_VLM)
def test_what_was_saved_comes_back(make, make_batch, tmp_path, name):
    vlm, _ = trained(make, make_batch, name, ["language"], steps=1)
    save(vlm, tmp_path / "model", "square")
    again = load(tmp_path / "model")
    assert fingerprint(again.model) == fingerprint(vlm.model)
    assert upcycled_layers(again.model.config) == [0]
    assert [row.name for row in parts.summary(again.model)] == [row.name for row in parts.summary(vlm.model)]
    routing.install(again.model)
    save(again, tmp_path / "again", "square")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is sparse already"):
        upcycle(again)


def test_the_checkpoint_is_as_servers_want_it(make, tmp_path):
    """Experts one by one, a narrow shared expert, and a text configuration that says what it is (§5)."""
    vlm = upcycle(make("clip", "llama-tied"))
    save(vlm, tmp_path / "model", "square")
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    layer = next(name for name in names if name.endswith(".layers.0.mlp.gate.weight")).removesuffix("gate.weight")
    assert {name.removeprefix(layer) for name in names if name.startswith(layer)} == {
        "gate.weight",
        "shared_expert_gate.weight",
        *(f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"experts.{expert}.{part}_proj.weight" for expert in range(4) for part in ("gate", "up", "down")),
    }
    text = json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]
    wanted = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "qkv_bias": True,
        "output_router_logits": False,
        "upcycled": {"from": "llama", "layers": [0]},
    }
    assert {key: text.get(key) for key in wanted} == wanted
    generated = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert generated.config.text_config.num_experts == 4


def test_a_language_model_alone_is_saved_by_its_own_means(tmp_path):
    dense = alone("llama-3")
    upcycle(dense).save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    close(logits(again, **texts(dense)), logits(dense, **texts(dense)), torch.float32)


def test_it_is_the_rooms_own_function_whatever_was_imported() -> None:
    import distilvlm.models as room

    # A module of the function's name would hide it: this file, among others, has imported from it.
    assert room.upcycle is upcycle
