"""Experts in a vision tower: what they compute, what they leave as it was, who learns, and what is noted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from distilvlm.models import forward
from distilvlm.models.alone import Alone
from distilvlm.models.mixture import Experts, MixConfig, Mixture, mix, mixtures, tallied, watched
from distilvlm.models.routing import used
from distilvlm.models.sources import config_from
from distilvlm.models.towers import blocks_of
from distilvlm.models.vlm import on_meta

from .encoder_models import CONFIGS

FAMILIES = {
    **{name: CONFIGS[name] for name in ("clip", "siglip", "dinov2", "dinov2-registers", "dinov3")},
    "dinov2-swiglu": CONFIGS["dinov2"] | {"use_swiglu_ffn": True},
    "dinov3-gated": CONFIGS["dinov3"] | {"use_gated_mlp": True},
    "vit": CONFIGS["clip"] | {"model_type": "vit"},
}


def tower_of(family: str = "clip", seed: int = 0) -> Any:
    """Weights of more than initialisation's size."""
    torch.manual_seed(seed)
    tower = AutoModel.from_config(config_from(FAMILIES[family], "config")).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return tower


def mixed(family: str = "clip", layer: int = -2, **config: Any) -> Any:
    """A tower with experts whose every parameter is another."""
    tower = tower_of(family)
    mix(tower, MixConfig(**{"rank": 4, "start": "kaiming", **config}), layer)
    torch.manual_seed(1)
    with torch.no_grad():
        for one in mixtures(tower):
            for parameter in one.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return tower


def pixels(pictures: int = 2, side: int = 24) -> Tensor:
    return torch.randn(pictures, 3, side, side, generator=torch.Generator().manual_seed(2))


def states(tower: Any, shown: Tensor | None = None) -> tuple[Tensor, ...]:
    return tower(pixels() if shown is None else shown, output_hidden_states=True).hidden_states


def looped(feed_forward: Any, x: Tensor, mode: str) -> Tensor:
    """The feed-forward of one tower with fc1 and fc2, token by token and expert by expert."""
    mixture: Mixture = feed_forward.mixture
    outs = []
    for token in x.flatten(0, -2):
        p = mixture.router(token).softmax(-1) if mixture.router is not None else torch.ones(1)
        best = int(p.argmax())
        serving = {
            "top1": {best: torch.ones(())},
            "top1_scaled": {best: p[best]},
            "dense": dict(enumerate(p)),
        }[mode]

        def added(place: int, inside: Tensor, serving: dict[int, Tensor] = serving) -> Any:
            experts: Any = mixture.experts[place]
            total = 0
            for e, share in serving.items():
                hidden = experts.down[e] @ inside + (experts.down_bias[e] if experts.down_bias is not None else 0)
                out = experts.up[e].T @ hidden + (experts.up_bias[e] if experts.up_bias is not None else 0)
                total = total + share * mixture.scale * out
            return total

        weights = {name: getattr(feed_forward, name) for name in ("fc1", "fc2")}
        hidden = weights["fc1"].weight @ token + weights["fc1"].bias + added(0, token)
        hidden = feed_forward.activation_fn(hidden)
        outs.append(weights["fc2"].weight @ hidden + weights["fc2"].bias + added(1, hidden))
    return torch.stack(outs).view(x.shape)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["top1", "top1_scaled", "dense", "alone"])
def test_two_products_are_a_loop_over_tokens_and_experts(mode: str, bias: bool):
    routing = "top1" if mode == "alone" else mode
    tower = mixed(experts=1 if mode == "alone" else 3, routing=routing, bias=bias, alpha=3.0)
    feed_forward = blocks_of(tower)[1][1].mlp
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    leaves = [x.requires_grad_(), *feed_forward.parameters()]
    found, expected = feed_forward(x), looped(feed_forward, x, routing)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.linspace(-1, 1, found.numel()).view_as(found)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_b_of_zero_a_tower_is_what_it_was_bit_by_bit(family: str):
    tower = tower_of(family)
    before = states(tower)
    found = mix(tower, MixConfig(rank=4), layer=-2)
    assert len(found) == 3
    assert len(found[0].experts) == (3 if family in ("dinov2-swiglu", "dinov3-gated") else 2)
    for one, other in zip(before, states(tower), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_change_what_is_read_and_gradients_reach_them(family: str):
    tower = mixed(family)
    read = states(tower)[-2]
    assert not torch.allclose(read, states(tower_of(family))[-2], atol=1e-2)
    read.square().sum().backward()
    for name, parameter in tower.named_parameters():
        if ".mixture.experts." in name:
            assert parameter.grad is not None and parameter.grad.any(), name
        elif ".mixture.router." in name:
            assert parameter.grad is None, name


def test_no_layer_behind_the_one_that_is_read_has_experts():
    for layer, expected in ((-1, 4), (-2, 3), (2, 2)):
        assert len(mix(tower_of(), MixConfig(rank=4), layer)) == expected
    assert len(mix(tower_of(), MixConfig(rank=4, layers=[2, 0]), -2)) == 2
    for layers, layer in (([3], -2), ([-1], -1), ([], -1), ("read", 0)):
        with pytest.raises(ValueError, match="cannot have experts"):
            mix(tower_of(), MixConfig(rank=4, layers=layers), layer)


def test_a_router_learns_only_where_its_probability_counts():
    for routing, learns in (("top1", False), ("top1_scaled", True), ("dense", True)):
        tower = mixed(routing=routing)
        states(tower)[-2].square().sum().backward()
        for one in mixtures(tower):
            assert one.router is not None
            assert (one.router.weight.grad is not None) == learns


def test_kaiming_start_adds_a_sixteenth_of_what_enters():
    """rms of s·B A x is √2·√2/32 of x's, whatever the sizes: the method differs from its encoder at once."""
    experts: Any = Experts(torch.nn.Linear(384, 500), MixConfig(dropout=0))
    torch.manual_seed(0)
    experts.draw("kaiming")
    added = experts.add(
        torch.zeros(1, 400, 500), torch.randn(1, 400, 384), torch.tensor([0, 1 / 32, 0]).expand(1, 400, 3)
    )
    assert float(added.detach().square().mean().sqrt()) == pytest.approx(2 / 32, rel=0.05)


def test_each_layer_is_drawn_by_the_seed_alone():
    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed + 5)
        return [one.experts[0].down for one in mix(tower_of(), MixConfig(rank=4), -2, seed)]  # type: ignore[misc]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_dropout_is_of_what_enters_experts_and_only_in_training():
    tower = mixed(dropout=0.5)
    once = states(tower)[-2]
    assert torch.equal(once, states(tower)[-2])
    tower.train()
    assert not torch.equal(states(tower)[-2], states(tower)[-2])
    with torch.no_grad():
        for one in mixtures(tower):
            for experts in one.experts:
                experts.up.zero_(), experts.up_bias.zero_()  # type: ignore[union-attr]
    assert torch.equal(states(tower)[-2], states(tower_of())[-2])  # nothing else is dropped


def test_dropout_keeps_the_mean_and_its_share():
    experts: Any = Experts(torch.nn.Linear(64, 64), MixConfig(experts=1, rank=64, dropout=0.25, bias=False)).train()
    with torch.no_grad():
        experts.down[0], experts.up[0] = torch.eye(64), torch.eye(64)
    torch.manual_seed(0)
    found = experts.add(torch.zeros(2, 501, 64), torch.ones(2, 501, 64), torch.ones(2, 501, 1)).detach()
    gone = (found == 0).double()
    torch.testing.assert_close(found[gone == 0], torch.full_like(found[gone == 0], 4 / 3))
    by_four = gone.view(-1, 4)  # one draw decides four numbers
    assert (by_four.mean(0) - 0.25).abs().max() < 0.02
    assert float(torch.corrcoef(by_four.T).triu(1).abs().max()) < 0.03


def test_choices_are_noted_in_the_order_of_the_layers():
    tower = mixed()
    with watched(tower) as seen:
        states(tower)
    assert len(seen) == 3
    router: Any = mixtures(tower)[0].router
    kept: list[Tensor] = []
    handle = blocks_of(tower)[1][0].mlp.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    states(tower)
    handle.remove()
    expected = router(kept[0]).softmax(-1)  # [pictures, tokens, experts], CLS included
    torch.testing.assert_close(seen[0].probabilities, expected)
    assert torch.equal(seen[0].experts, expected.argmax(-1))
    with watched(mixed(experts=1)) as none:
        states(tower)
    assert none == []


def test_checkpointing_notes_once():
    tower = mixed(routing="top1_scaled").train()
    forward.enable_gradient_checkpointing(Alone(tower, -2))
    with watched(tower) as seen:  # around the backward pass, too, in which layers run again
        states(tower)[-2].square().sum().backward()
    assert len(seen) == 3


def test_checkpointed_gradients_are_those_without():
    found = []
    for checkpointed in (False, True):
        tower = mixed(routing="top1_scaled", dropout=0.0).train()
        if checkpointed:
            forward.enable_gradient_checkpointing(Alone(tower, -2))
        with watched(tower) as seen:
            read = states(tower)[-2]
        (read.square().mean() + sum(choice.probabilities[..., 0].mean() for choice in seen)).backward()
        found.append({name: p.grad for name, p in tower.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_use_is_tallied_over_the_pictures_that_count():
    tower = mixed()
    with watched(tower) as seen:
        states(tower, pixels(3))
    counts = torch.tensor([True, False, True])
    layer = used(tallied(seen, counts), top_k=1)[1]
    chosen = seen[1].experts[counts].flatten()
    assert layer.load == [float((chosen == e).double().mean()) for e in range(3)]
    p = seen[1].probabilities[counts].detach().double()
    assert layer.entropy == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    assert layer.dropped == 0


def test_under_autocast_choices_are_made_in_fp32():
    tower = mixed()
    with watched(tower) as seen, torch.autocast("cpu", torch.bfloat16):
        read = states(tower)[-2]
    assert {choice.probabilities.dtype for choice in seen} == {torch.float32}
    exact = states(tower)[-2]
    # Here and there a token that is torn between two goes the other way.
    close = (read.float() - exact).flatten(0, 1).abs().max(1).values < 0.05 * exact.abs().max()
    assert close.float().mean() > 0.8


def test_copies_have_experts_of_their_own():
    tower = mixed()
    before = states(tower)[-2]
    other = copy.deepcopy(tower)
    with torch.no_grad():
        for one in mixtures(other):
            for parameter in one.parameters():
                parameter.zero_()
    assert torch.equal(states(tower)[-2], before)
    assert torch.equal(states(other)[-2], states(tower_of())[-2])
    assert states(on_meta(tower), pixels().to("meta"))[-2].shape == before.shape


def test_what_cannot_have_experts_is_refused():
    tower = mixed()
    with pytest.raises(ValueError, match="has a mixture of experts already"):
        mix(tower, MixConfig(rank=4), -2)
    with pytest.raises(ValueError, match="at least 1 expert of rank 1, not 0 of rank 32"):
        MixConfig(experts=0)
    tower = tower_of()
    for block in blocks_of(tower)[1]:
        block.mlp.fc2 = torch.nn.Linear(32, 8)
    with pytest.raises(
        ValueError,
        match="CLIPMLP is no feed-forward that experts can be added to: its linear layers are fc1 16→32, fc2",
    ):
        mix(tower, MixConfig(rank=4), -2)
    for block in blocks_of(tower)[1]:
        del block.mlp
    with pytest.raises(
        ValueError, match=r"CLIPEncoderLayer has no feed-forward .* self_attn, layer_norm1, layer_norm2"
    ):
        mix(tower, MixConfig(rank=4), -2)
