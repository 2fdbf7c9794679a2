"""LLaVA-MoD's golden cases of the gate and of the sparse layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distilvlm.losses import balance
from distilvlm.models import routing
from distilvlm.models.upcycling import upcycle
from tests import golden_llava_mod_rules as rules
from tests.golden_cases import Reading, near, scaled

VALUES, GRADIENTS = 1e-5, 1e-6
TRAINING_CAPACITY = 1.5

DEPARTURES = {
    "evaluation": "the reference draws the second expert in evaluation, too; ours is the likeliest there, always",
    "residual": "there is no residual branch: the method leaves that flag off. The layer is the sparse one alone",
}


def aux(probabilities: Tensor) -> Tensor:
    """The balance as the reference has it: every position counts."""
    return balance(probabilities, torch.ones(len(probabilities), dtype=torch.bool))


# The gate


def check_gate(reading: Reading) -> None:
    logits = reading.input("logits")
    settings = dict.fromkeys(name.rpartition(".")[0] for name in reading.names)
    for setting in settings:
        if (found := re.fullmatch(r"(\w+?)_cf([\d.]+)", setting)) is None:
            continue
        drawn = next((name for name in (f"{found[1]}_noise", found[1]) if name in reading), None)
        if found[1] != "zero" and drawn is None:
            continue
        noise = None if drawn is None else reading.input(drawn)
        for name, value in _gate(logits, noise, float(found[2])).items():
            if (key := f"{setting}.{name}") not in reading:
                continue
            if value.is_floating_point():
                reading.near(key, value, GRADIENTS if name.startswith("grad") else VALUES)
            else:
                reading.same(key, value)


def _gate(logits: Tensor, noise: Tensor | None, factor: float) -> dict[str, Tensor]:
    logits = logits.clone().requires_grad_()
    tokens, experts = logits.shape
    routed = routing.route(logits, 2, noise, factor)
    places = routing.places(tokens, experts, 2, factor)
    combine = _combine(routed, experts, places)
    probe = torch.arange(combine.numel(), dtype=torch.float32).view_as(combine) / combine.numel()
    l_aux = aux(routed.probabilities)
    return {
        "l_aux": l_aux,
        "grad_l_aux": torch.autograd.grad(l_aux, logits, retain_graph=True)[0],
        "exp_counts": routed.experts[:, 0].bincount(minlength=experts),
        "capacity": torch.tensor(places),
        "token_expert_weight": combine.sum(2),
        "combine_weights": combine,
        "dispatch_mask": combine > 0,
        "grad_combine_probe": torch.autograd.grad((combine * probe).sum(), logits)[0],
    }


def _combine(routed: routing.Routing, experts: int, places: int) -> Tensor:
    """Weights by token, expert and place in its queue, [tokens, experts, places]: what the reference dispatches by."""
    assert routed.dropped is not None
    queue, where, weights = [0] * experts, [], []
    for choice in range(routed.experts.shape[1]):
        for token, expert in enumerate(routed.experts[:, choice].tolist()):
            if not routed.dropped[token, choice]:
                where.append((token, expert, queue[expert]))
                weights.append(routed.weights[token, choice])
            queue[expert] += 1
    index = tuple(torch.tensor(where).T)
    return torch.zeros(len(routed.experts), experts, places).index_put(index, torch.stack(weights))


# The sparse layer


class Layer:
    """An upcycled stock block with a case's weights."""

    def __init__(self, reading: Reading) -> None:
        gate, up, down = (reading.input(f"ffn_{name}") for name in ("gate", "up", "down"))
        self.router = reading.input("router_weight")
        config = Qwen2Config(
            vocab_size=17,
            hidden_size=gate.shape[1],
            intermediate_size=gate.shape[0],
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        dense: Any = Qwen2ForCausalLM(config)
        self.dense = dense.model.layers[0].mlp
        with torch.no_grad():
            for name, weight in (("gate", gate), ("up", up), ("down", down)):
                getattr(self.dense, f"{name}_proj").weight.copy_(weight)
        sparse: Any = upcycle(dense, experts=len(self.router), layers="all")
        self.block = sparse.model.layers[0].mlp
        self.drawn = self.block.gate.weight.detach().clone()  # before it is the case's
        self.copied = (torch.cat([gate, up]), down)
        self.are_copies = all(
            torch.equal(expert, one)
            for experts, one in zip(self._experts(), self.copied, strict=True)
            for expert in experts
        )
        with torch.no_grad():
            self.block.gate.weight.copy_(self.router)

    def _experts(self) -> tuple[Tensor, Tensor]:
        return self.block.experts.gate_up_proj, self.block.experts.down_proj

    def hold(self, gate: Tensor | None, up: Tensor | None, down: Tensor | None) -> None:
        """These experts, [experts, ...] each; None: copies of the dense feed-forward."""
        both = None if gate is None or up is None else torch.cat([gate, up], 1)
        with torch.no_grad():
            for parameter, own, copied in zip(self._experts(), (both, down), self.copied, strict=True):
                parameter.copy_(copied if own is None else own)

    def run(self, x: Tensor, training: bool, noise: Tensor | None) -> tuple[Tensor, routing.Routing]:
        self.block.train(training)
        routing.install(self.block, "argmax" if noise is None else "gumbel", TRAINING_CAPACITY)
        with patch.object(routing, "gumbel", return_value=noise) as drawn, routing.watched(self.block, None) as seen:
            out = self.block(x)
        assert drawn.called == (training and noise is not None)
        return out, seen[0]

    def rule(self, x: Tensor, noise: Tensor | None, factor: float) -> Tensor:
        both, down = (weight.detach() for weight in self._experts())
        gate, up = both.chunk(2, 1)
        return rules.moe(x, self.router, (gate, up, down), noise, factor)[0]


def grouped(check: Callable[[Reading], None]) -> Callable[[Reading], None]:
    """torch's grouped product refuses widths that are no multiple of 16 bytes: transformers then has its own."""

    def run(reading: Reading) -> None:
        aligned = all(size % 4 == 0 for size in reading.input("ffn_gate").shape)
        name = "transformers.integrations.moe._can_use_grouped_mm"
        with nullcontext() if aligned else patch(name, return_value=False):
            check(reading)

    return run


@grouped
def check_layer(reading: Reading) -> None:
    layer = Layer(reading)
    x = reading.input("x")
    _check_settings(reading, layer, x)
    for name, ours in (
        ("dense_out", lambda: layer.dense(x)),
        # U(-1/√d, 1/√d), of which the largest of a few dozen draws comes close to the end.
        ("router_init_bound", lambda: torch.tensor(layer.router.shape[1] ** -0.5)),
    ):
        if name in reading:
            reading.near(name, ours(), VALUES)
    bound = layer.router.shape[1] ** -0.5
    for weight in (layer.drawn, layer.router):
        assert 0.7 * bound < float(weight.abs().max()) <= bound
    if "x_skewed" in reading:
        _check_overload(layer, reading.input("x_skewed"))
    if "init_experts_equal_dense" in reading:
        reading.same(
            "init_experts_equal_dense",
            torch.tensor([layer.are_copies]).view_as(reading.input("init_experts_equal_dense")),
        )


@grouped
def check_residual(reading: Reading) -> None:
    layer = Layer(reading)
    width = layer.router.shape[1]
    x = reading.case.sibling(lambda arrays: "x" in arrays and arrays["x"].shape[-1] == width)["x"]
    reading.given |= {"coef_weight", "coef_bias"} & set(reading.names)
    _check_settings(reading, layer, x, residual=True)


def _check_overload(layer: Layer, x: Tensor) -> None:
    """Experts take no more than they can: a token that one of its two drops has the other alone."""
    out, routed = layer.run(x, True, None)
    rule = layer.rule(x, None, TRAINING_CAPACITY)
    near(out, rule, scaled(VALUES, rule), "an overloaded layer in float64")
    assert routed.dropped is not None and routed.dropped.any()
    alone = routed.weights[routed.dropped.sum(1) == 1].max(1).values
    near(alone, torch.ones_like(alone), VALUES, "weight of a lone survivor")


def _check_settings(reading: Reading, layer: Layer, x: Tensor, residual: bool = False) -> None:
    mixed = tuple(
        reading.input(name) if name in reading else None for name in ("experts_gate", "experts_up", "experts_down")
    )
    for setting in dict.fromkeys(name.rpartition(".")[0] for name in reading.names):
        found = re.fullmatch(r"(?:(upcycled|mixed|skewed)\.)?(train|eval)\.(\w+)", setting)
        if found is None:
            continue
        own = mixed if found[1] != "upcycled" else (None, None, None)
        layer.hold(*own)
        shown = reading.input("x_skewed") if found[1] == "skewed" else x
        noise = None if found[3] == "zero" else _noise(reading, f"{found[3]}_noise", shown, len(layer.router))
        training = found[2] == "train"
        out, routed = layer.run(shown, training, noise)
        factor = TRAINING_CAPACITY if training else 2.0
        values = {
            "l_aux": aux(routed.probabilities),
            "exp_counts": routed.experts[:, 0].bincount(minlength=len(layer.router)),
            "capacity": torch.tensor(routing.places(len(routed.experts), len(layer.router), 2, factor)),
            "token_expert_weight": torch.zeros_like(routed.probabilities).scatter(1, routed.experts, routed.weights),
        }
        for name, value in values.items():
            if (key := f"{setting}.{name}") in reading:
                compare: Callable[..., None] = reading.near if value.is_floating_point() else reading.same
                compare(key, value, *([VALUES] if value.is_floating_point() else []))
        key, copies = f"{setting}.out", all(part is None for part in own)
        if key not in reading:
            continue
        rule = layer.rule(shown, noise if training else None, factor)
        near(out, rule, scaled(VALUES, rule), f"{key} in float64")
        if not training and noise is not None and not copies:
            reading.departs(key, "evaluation", out, layer.rule(shown, None, factor), VALUES)
        elif residual and not copies:
            reading.departs(key, "residual", out, layer.rule(shown, noise, factor), VALUES)
        else:  # with copies for experts it makes no difference who serves a token, nor a branch of the same weights
            reading.near(key, out, VALUES)


def _noise(reading: Reading, name: str, x: Tensor, experts: int) -> Tensor:
    if name in reading:
        return reading.input(name)
    shape = (x.flatten(0, -2).shape[0], experts)
    return reading.case.sibling(lambda arrays: name in arrays and arrays[name].shape == shape)[name]
