"""MoVE-KD's golden cases: golden/move_kd.md says what each array is.

The loss goes through `Adapters` and `Objective` as in a stage; layer and student are stock modules that were given
experts, with the reference's weights read by the converter of its checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP

from distilvlm.losses import Comparing, Objective, Pictures
from distilvlm.losses.encoder import encoder_term, expert_balance, teacher_score, teacher_weights, token_weights
from distilvlm.models.adapters import Adapters, Tokens
from distilvlm.models.encoders import cls_attention, importance_of, reference_layout
from distilvlm.models.encoders.interface import flattened
from distilvlm.models.mixed_classes import stock_config
from distilvlm.models.mixture import MixConfig, Mixture, watched
from distilvlm.models.move_kd import of_feed_forward, stock_names, tower_of
from distilvlm.recipe import ANCHOR
from tests.golden_cases import GoldenCase, Reading, near

VALUES, GRADIENTS = 1e-5, 1e-4

CLOSING = ("w/vision_model.post_layernorm.weight", "w/vision_model.post_layernorm.bias")
"""Stand behind all hidden states that the file has."""


def text(array: Tensor) -> str:
    return bytes(array.tolist()).decode()


# The loss


def check_loss(reading: Reading) -> None:
    names = text(reading.input("in/teachers")).split("\n")
    weight, anchor_weight, balance, by_token, by_teacher = reading.input("in/hparams").tolist()
    student, clip = reading.input("in/student_hidden_m2").clone().requires_grad_(), reading.input("in/clip_hidden_m2")
    rules = Comparing(
        token_weights="reference" if by_token else "none",
        teacher_weights="reference" if by_teacher else "none",
        anchor_weight=anchor_weight,
        detach=False,
    )
    targets: dict[str, Tensor] = {ANCHOR: clip[:, 1:]}
    grids: dict[str, tuple[int, int]] = {}
    for name in names[1:]:
        raw = reading.input(f"in/raw_{name}")
        targets[name], grids[name] = flattened(raw) if raw.dim() == 4 else (raw, (1, raw.shape[1]))
    form = Tokens(student.shape[-1], (1, student.shape[1] - 1))
    forms = {ANCHOR: form} | {name: Tokens(targets[name].shape[-1], grids[name]) for name in names[1:]}
    adapters = Adapters(form, forms, rules)
    own = dict(adapters.named_parameters())
    theirs = {_adapter(name): name for name in own}
    for key, name in theirs.items():
        own[name].data = reading.input(f"in/{key}").clone()

    rows = reading.input("in/clip_attn_m2")[:, :, 0, 1:]  # of CLS to patches
    weights = token_weights("reference", importance_of(rows), rows)
    assert weights is not None
    reading.near("out/token_weight", weights, VALUES)
    pairs = adapters(student[:, 1:], targets, weights if by_token else None, query=clip[:, 0])
    for pair in pairs[1:]:
        reading.near(f"out/adapted_{pair.teacher}", pair.target, VALUES)
    scores = torch.stack([teacher_score(clip[:, 0], pair.target, scaled=False) for pair in pairs], dim=1)
    reading.near("out/raw_scores", scores, VALUES)
    for name, value in {
        "out/else_weight_batchmean_before_flatten": teacher_weights(scores[:, 1:], None).mean(0),
        "out/else_weight_after_flatten": teacher_weights(scores[:, 1:], None, flatten=True),
    }.items():
        if name in reading:
            reading.near(name, value, VALUES)
    _, distances, found = encoder_term(pairs, rules)
    reading.near("out/teacher_weight", found, VALUES)
    reading.near("out/teacher_loss_x_kdw", weight * distances, VALUES)

    routed = reading.input("in/routing_probs").clone().requires_grad_()  # [layers, pictures, tokens, experts]
    chosen = torch.nn.functional.one_hot(routed.argmax(-1), routed.shape[-1])
    reading.same("in/expert_choice", chosen)
    objective = Objective(text=0, encoder=weight, expert_balance=balance, comparing=rules)
    pictures = Pictures(torch.arange(len(student)), pairs, routed.unbind(0))
    outcome = objective.of_pictures(pictures, torch.ones(len(student)), len(student))
    reading.near("out/kd_loss_x_kdw", (weight * outcome.terms["encoder"]).view(1), VALUES)
    reading.near("out/balancing_loss", outcome.terms["expert_balance"].view(1), VALUES)
    reading.near("out/total_loss", reading.input("out/text_loss") + outcome.loss, VALUES)
    _check_loss_gradients(reading, outcome.loss, balance, student, routed, {key: own[n] for key, n in theirs.items()})


def _check_loss_gradients(
    reading: Reading, loss: Tensor, balance: float, student: Tensor, routed: Tensor, adapters: Mapping[str, Tensor]
) -> None:
    leaves = {"grad_kd/student_hidden_m2": student} | {f"grad_kd/{key}": leaf for key, leaf in adapters.items()}
    found = torch.autograd.grad(loss, [*leaves.values(), routed], retain_graph=True)
    for name, gradient in zip(leaves, found[:-1], strict=True):
        reading.near(name, gradient, GRADIENTS)
    each = torch.autograd.grad(expert_balance(routed.unbind(0)).mean(), routed)[0]
    reading.near("grad_balance/routing_probs", each, GRADIENTS)
    torch.testing.assert_close(found[-1], balance * each)


def _adapter(name: str) -> str:
    """'of.EVA.channels.weight' → 'EVA_adapter_1_weight'"""
    _, teacher, part, kind = name.split(".")
    return f"{teacher}_adapter_{1 if part == 'channels' else 2}_{kind}"


# The layer


def check_layer(reading: Reading) -> None:
    weights = {name.removeprefix("w/"): reading.input(name) for name in reading.names if name.startswith("w/")}
    x = reading.input("x")
    for mode in ("sparse", "dense"):
        if f"{mode}/y" in reading:
            _check_mode(reading, mode, weights, x)


def _check_mode(reading: Reading, mode: str, weights: Mapping[str, Tensor], x: Tensor) -> None:
    count, rank = (
        1 + max(int(n.split(".")[1]) for n in weights if "moe_" in n),
        weights["moe_down.0.lora_A.bias"].numel(),
    )
    inner, width = weights["original_module.fc1.weight"].shape
    layer = CLIPMLP(CLIPVisionConfig(hidden_size=width, intermediate_size=inner, num_attention_heads=1))
    config = MixConfig(count, rank, alpha=1, routing="top1" if mode == "sparse" else "dense")
    layer.add_module("mixture", Mixture(layer, config))
    layer.load_state_dict(of_feed_forward(weights), strict=True)
    layer.eval()
    x = x.clone().requires_grad_()
    with watched(layer) as seen:
        y = layer(x)
    (choice,) = seen
    reading.near(f"{mode}/y", y, VALUES)
    if (name := f"{mode}/routing") in reading:
        reading.near(name, choice.probabilities, VALUES)
    if (name := f"{mode}/expert_choice") in reading:
        reading.same(name, torch.nn.functional.one_hot(choice.experts, count))
    if (name := f"{mode}/index") in reading:
        reading.same(name, choice.experts)
    y.backward(reading.input(f"{mode}/gy" if f"{mode}/gy" in reading else "sparse/gy"))
    assert x.grad is not None
    reading.near(f"{mode}/grad_x", x.grad, GRADIENTS)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    without = {name for name in weights if _ours(name, gradients) is None}
    if (name := f"{mode}/params_without_grad") in reading:
        assert set(text(reading.input(name)).split("\n")) == without
    for name in weights.keys() - without:
        found = _ours(name, gradients)
        assert found is not None
        reading.near(f"{mode}/grad/{name}", found, GRADIENTS)


def _ours(name: str, gradients: Mapping[str, Tensor | None]) -> Tensor | None:
    """The gradient of a weight of the reference's, out of those of ours."""
    if expert := re.fullmatch(r"moe_(down|up)\.(\d+)\.lora_([AB])\.(weight|bias)", name):
        part = {"A": "down", "B": "up"}[expert[3]] + ("_bias" if expert[4] == "bias" else "")
        found = gradients[f"mixture.experts.{int(expert[1] == 'up')}.{part}"]
        assert found is not None
        found = found[int(expert[2])]
        return found.T if part == "up" else found
    return gradients[f"mixture.{name}" if name.startswith("router.") else name.removeprefix("original_module.")]


# The student


def check_student(reading: Reading) -> None:
    facts: dict[str, Any] = json.loads(text(reading.input("config")))
    alpha = facts.pop("lora_alpha")
    rank, count = facts.pop("lora_rank"), facts.pop("num_experts")
    config = CLIPVisionConfig(**facts)
    state = stock_names({name.removeprefix("w/"): reading.input(name) for name in reading.names if name[:2] == "w/"})
    tower = tower_of(state, config, alpha)
    assert (tower.config.mixture["rank"], tower.config.mixture["experts"]) == (rank, count)
    pixels = reading.input("pixel_values")
    with torch.no_grad(), watched(tower) as seen:
        states = tower(pixels, output_hidden_states=True).hidden_states
    for number, found in enumerate(states):
        reading.near(f"hidden_{number}", found, VALUES)
    reading.near("patch_features_m2", states[-2][:, 1:], VALUES)
    for number, choice in enumerate(seen):
        reading.near(f"routing_{number}", choice.probabilities, VALUES)
        reading.same(f"choice_{number}", torch.nn.functional.one_hot(choice.experts, count))
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    for number, found in enumerate(attentions):
        reading.near(f"attn_{number}", found, VALUES)
        near(cls_attention(tower, number + 1, pixels), found[:, :, 0, 1:], VALUES, f"the CLS row of attn_{number}")
    stock = AutoModel.from_config(stock_config(tower.config)).eval()
    stock.load_state_dict({name: value for name, value in state.items() if "mixture" not in name}, strict=True)
    with torch.no_grad():
        reading.near("base_hidden_m2", stock(pixels, output_hidden_states=True).hidden_states[-2], VALUES)


# SAM


def check_layout(reading: Reading) -> None:
    reading.same("upstream_out", reference_layout(reading.input("neck_in")))


KINDS = (
    (check_loss, {"in/student_hidden_m2", "in/clip_attn_m2"}),
    (check_layer, {"x", "w/router.weight", "w/original_module.fc1.weight"}),
    (check_student, {"pixel_values", "config"}),
    (check_layout, {"neck_in"}),
)
"""How each kind is compared, and the arrays by which it is told."""


def read(case: GoldenCase) -> Reading | None:
    """What was compared with what; None for a case of another kind."""
    for compare, needs in KINDS:
        if needs <= case.arrays.keys():
            reading = Reading(case, {})
            compare(reading)
            reading.finish()
            return reading
    return None


def check(case: GoldenCase) -> bool:
    """Compares the case if it is one of ours; False if its arrays are of another kind."""
    return read(case) is not None
