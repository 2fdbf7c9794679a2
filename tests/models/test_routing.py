"""Routing: which experts serve a token, in training and in evaluation, and what is told of it."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock, Qwen2MoeTopKRouter

from distilvlm.models import forward, routing
from distilvlm.models.upcycling import upcycle

WIDTH, EXPERTS = 8, 4


def config(**changes):
    facts = {
        "hidden_size": WIDTH,
        "moe_intermediate_size": 12,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 4,
    }
    return Qwen2MoeConfig(**(facts | changes))


def logits(tokens, experts=EXPERTS, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def router(**options):
    torch.manual_seed(0)
    made = routing.Router(nn.Parameter(torch.randn(EXPERTS, WIDTH)), 2).train()
    for name, value in options.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_it_is_the_stock_gate_where_nothing_is_drawn_or_dropped(top_k):
    stock = Qwen2MoeTopKRouter(config(num_experts_per_tok=top_k))
    nn.init.normal_(stock.weight)
    hidden = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = stock(hidden)
    found = routing.Router(stock.weight, top_k)(hidden)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_probabilities_are_over_all_experts_and_weights_sum_to_one():
    routed = routing.route(logits(30), 2)
    torch.testing.assert_close(routed.probabilities, logits(30).softmax(-1))
    torch.testing.assert_close(routed.weights.sum(1), torch.ones(30))
    ratio = routed.probabilities.gather(1, routed.experts)
    torch.testing.assert_close(routed.weights, ratio / ratio.sum(1, keepdim=True))


def test_noise_moves_all_choices_but_the_first():
    quiet, loud = (routing.route(logits(200), 3, noise) for noise in (None, 5 * logits(200, seed=9)))
    assert torch.equal(quiet.experts[:, 0], loud.experts[:, 0])
    assert not torch.equal(quiet.experts[:, 1], loud.experts[:, 1])
    assert all(len(set(chosen)) == 3 for chosen in loud.experts.tolist())
    assert torch.equal(quiet.probabilities, loud.probabilities)


def test_gumbel_noise_draws_the_second_expert_by_its_probability():
    tokens, hidden = 20000, torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(2)) * 0.4
    gate = router(second_expert="gumbel")
    z, _, experts = gate(hidden.expand(tokens, -1))
    p = z[0].detach().softmax(-1)
    first = int(p.argmax())
    assert (experts[:, 0] == first).all()
    for expert in range(EXPERTS):
        share = 0.0 if expert == first else float(p[expert] / (1 - p[first]))
        found = float((experts[:, 1] == expert).float().mean())
        assert abs(found - share) <= 4 * math.sqrt(share * (1 - share) / tokens), (expert, found, share)


def test_a_full_expert_drops_the_latest_second_choices_after_first_ones():
    # Tokens 0 to 3 want expert 0 first; 4 and 5 want it second; each expert takes 3.
    z = torch.tensor([[5.0, 4, 0, 0]] * 4 + [[4.0, 0, 5, 0]] * 2)
    assert routing.places(6, 4, 2, 1.0) == 3
    routed = routing.route(z, 2, capacity=1.0)
    assert routed.dropped.tolist() == [
        [False, False], [False, False], [False, False], [True, True], [False, True], [False, True]
    ]  # fmt: skip
    weights = routed.weights
    torch.testing.assert_close(weights[0], routing.route(z, 2).weights[0])
    assert weights[3].tolist() == [0, 0]  # neither of its experts has a place
    torch.testing.assert_close(weights[4], torch.tensor([1.0, 0]))  # the survivor serves alone


def test_a_dropped_choice_has_no_gradient_and_the_survivor_none_either():
    z = torch.tensor([[5.0, 4, 0, 0]] * 2 + [[4.0, 0, 5, 0]] * 4, requires_grad=True)
    routed = routing.route(z, 2, capacity=0.5)  # 2 places
    probe = torch.arange(12.0).view(6, 2)
    (slope,) = torch.autograd.grad((routed.weights * probe).sum(), z)
    alone = routed.dropped.any(1)
    assert alone.any() and not alone.all()
    assert (slope[alone].abs() < 1e-6).all() and (slope[~alone] != 0).any()


def test_padding_takes_no_place_and_counts_as_no_token():
    z, real = logits(24) + torch.tensor([3.0, 0, 0, 0]), torch.arange(24) % 3 != 0
    routed = routing.route(z, 2, capacity=0.8, real=real)
    alone = routing.route(z[real], 2, capacity=0.8)
    assert alone.dropped.any()
    assert torch.equal(routed.dropped[real], alone.dropped)
    assert torch.equal(routed.weights[real], alone.weights)
    assert not routed.dropped[~real].any()


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "capacity", "expected"),
    [(10, 4, 2, 1.5, 8), (10, 4, 2, 100, 500), (20, 4, 2, 1.1, 11), (0, 4, 2, 1.5, 0), (3, 4, 1, 0.1, 1)],
)
def test_places_are_rounded_up_as_the_reference_rounds(tokens, experts, top_k, capacity, expected):
    assert routing.places(tokens, experts, top_k, capacity) == expected


def test_the_router_works_in_fp32_under_autocast():
    gate, hidden = router(), torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3))
    expected = nn.functional.linear(hidden, gate.weight)
    with torch.autocast("cpu", torch.bfloat16):
        found, weights, _ = gate(hidden)
        rounded = nn.functional.linear(hidden, gate.weight)
    assert torch.equal(found, expected) and rounded.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    half = hidden.bfloat16()
    found, weights, _ = gate(half)
    assert torch.equal(found, nn.functional.linear(half.float(), gate.weight))
    assert weights.dtype == torch.bfloat16  # what the block multiplies with


def test_evaluation_draws_nothing_and_drops_nothing_whatever_the_options():
    plain, options = router(), router(second_expert="gumbel", capacity=0.1)
    hidden = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(4))
    state = torch.random.get_rng_state()
    expected = plain.eval()(hidden)
    for _ in range(2):
        for found, wanted in zip(options.eval()(hidden), expected, strict=True):
            assert torch.equal(found, wanted)
    assert torch.equal(torch.random.get_rng_state(), state)
    found = options.train()(hidden)
    assert not torch.equal(found[1], expected[1]) and not torch.equal(torch.random.get_rng_state(), state)


def test_the_global_generator_decides_what_training_draws():
    gate, hidden = router(second_expert="gumbel"), torch.randn(64, WIDTH)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(gate(hidden)[2])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# In a model


@pytest.fixture
def sparse(make):
    return upcycle(make("clip", "qwen2-tied"), layers="all", seed=5)


def test_routers_stand_in_every_sparse_block_with_the_weight_that_was_there(sparse):
    found = routing.routers(sparse.model)
    assert len(found) == 2 and all(one.top_k == 2 for one in found)
    weights = [one.weight for one in found]
    again = routing.install(sparse.model, "gumbel", 1.5)
    assert again == found and all(one.weight is weight for one, weight in zip(found, weights, strict=True))
    assert all(one.second_expert == "gumbel" and one.capacity == 1.5 for one in found)
    routing.install(sparse.model)
    assert all(one.second_expert == "argmax" and one.capacity is None for one in found)
    names = [name for name, _ in sparse.model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert names == [f"model.language_model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]


def test_a_model_that_does_not_renormalise_is_refused():
    with pytest.raises(ValueError, match="norm_topk_prob: false"):
        routing.install(Qwen2MoeSparseMoeBlock(config(norm_topk_prob=False)))


def run(vlm, batch):
    features = forward.vision_features(vlm.model, vlm.layout, batch.pictures)
    return forward.hidden_states(vlm.model, vlm.layout, batch, features)


def test_a_watch_notes_every_layer_once_in_order_and_ends_with_its_block(sparse, make_batch):
    batch = make_batch(sparse, ["ab#c", "#de"])
    real = batch.attention_mask.flatten().bool()
    given = []
    hooks = [
        gate.register_forward_pre_hook(lambda _, args: given.append(*args)) for gate in routing.routers(sparse.model)
    ]
    with routing.watched(sparse.model, real) as seen:
        run(sparse, batch)
    for gate, hidden, layer in zip(routing.routers(sparse.model), given, seen, strict=True):
        assert torch.equal(layer.probabilities, nn.functional.linear(hidden, gate.weight).softmax(-1))
        assert len(layer.experts) == len(real) and gate._seen is None and gate._real is None
    for hook in hooks:
        hook.remove()
    run(sparse, batch)
    assert len(seen) == 2
    with pytest.raises(RuntimeError), routing.watched(sparse.model, real):
        raise RuntimeError
    assert routing.routers(sparse.model)[0]._seen is None


def test_what_is_told_of_a_layer():
    z = torch.tensor([[5.0, 4, 0, 0]] * 4 + [[4.0, 0, 5, 0]] * 2 + [[9.0, 0, 0, 8]])
    real = torch.tensor([True] * 6 + [False])
    routed = routing.route(z, 2, capacity=1.0, real=real)
    (use,) = routing.used(routing.tallied([routed], real), 2)
    # Of 12 choices, 4 are dropped (see above); expert 0 serves 3, expert 1 three, expert 2 two.
    assert use.load == [3 / 8, 3 / 8, 2 / 8, 0]
    assert use.dropped == 4 / 12
    p = z[:6].softmax(-1).double()
    assert math.isclose(use.entropy, float(-(p * p.log()).sum(-1).mean()), rel_tol=1e-6)


def test_uniform_probabilities_have_the_largest_entropy():
    routed = routing.route(torch.zeros(10, EXPERTS), 2)
    (use,) = routing.used(routing.tallied([routed], torch.ones(10, dtype=torch.bool)), 2)
    assert math.isclose(use.entropy, math.log(EXPERTS), rel_tol=1e-6) and use.dropped == 0


def test_tallies_of_micro_batches_add_up():
    z, real = logits(40), torch.arange(40) % 5 != 0
    whole = routing.tallied([routing.route(z, 2)], real)
    parts = [routing.tallied([routing.route(z[at], 2)], real[at]) for at in (slice(0, 13), slice(13, 40))]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_nothing_real_is_told_as_nothing():
    none = torch.zeros(6, dtype=torch.bool)
    (use,) = routing.used(routing.tallied([routing.route(logits(6), 2, capacity=1.0, real=none)], none), 2)
    assert use == routing.LayerUse([0, 0, 0, 0], 0, 0)


@pytest.mark.parametrize("second_expert", ["argmax", "gumbel"])
@pytest.mark.parametrize("capacity", [None, 0.6])
def test_gradient_checkpointing_gives_the_same_gradients_and_notes_nothing_twice(
    make, make_batch, second_expert, capacity
):
    """With a capacity, padding must take no place when a layer is run again, either: other tokens would be dropped."""
    gradients, noted = [], []
    for checkpointing in (False, True):
        vlm = upcycle(make("clip", "qwen2-tied"), layers="all", seed=5)
        vlm.model.train()
        routing.install(vlm.model, second_expert, capacity)
        if checkpointing:
            forward.enable_gradient_checkpointing(vlm.model)
        batch = make_batch(vlm, ["ab#cdefgh", "#d", "k"])
        real = batch.attention_mask.flatten().bool()
        torch.manual_seed(7)
        with routing.watched(vlm.model, real) as seen:
            hidden = run(vlm, batch)
        loss = hidden.flatten(0, 1)[real].pow(2).sum() + sum(layer.probabilities.pow(2).sum() for layer in seen)
        loss.backward()
        noted.append(list(seen))
        gradients.append({name: p.grad for name, p in vlm.model.named_parameters() if p.grad is not None})
        assert len(seen) == 2
    if capacity:
        assert noted[0][0].dropped.any()
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_fp32_routers_train_under_autocast(make, make_batch):
    vlm = upcycle(make("clip", "qwen2-tied"), layers="all", seed=5)
    vlm.model.train()
    before = copy.deepcopy([gate.weight for gate in routing.routers(vlm.model)])
    optimizer = torch.optim.SGD(vlm.model.parameters(), lr=0.1)
    batch = make_batch(vlm, ["ab#c", "#de"])
    with torch.no_grad():  # equal experts leave nothing to choose between
        for name, parameter in vlm.model.named_parameters():
            if ".mlp.experts." in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    with torch.autocast("cpu", torch.bfloat16), routing.watched(vlm.model, None) as seen:
        hidden = run(vlm, batch)
    assert all(layer.probabilities.dtype == torch.float32 for layer in seen)
    hidden.float().pow(2).sum().backward()
    optimizer.step()
    for gate, old in zip(routing.routers(vlm.model), before, strict=True):
        assert gate.weight.dtype == torch.float32 and gate.weight.grad.dtype == torch.float32
        assert not torch.equal(gate.weight, old)


def test_a_token_s_only_expert_tells_the_router_nothing():
    """Its weight is 1 whatever the router thinks; that is the dense model's function, and why two are the default."""
    z = logits(20).requires_grad_()
    routed = routing.route(z, 1)
    assert torch.equal(routed.weights, torch.ones(20, 1))
    (slope,) = torch.autograd.grad((routed.weights * torch.arange(20.0).unsqueeze(1)).sum(), z)
    assert slope.abs().max() < 1e-5
