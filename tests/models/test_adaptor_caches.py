"""Key-value caches with inserted layers: every kind that `generate` makes, and whose a cache is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

from distilvlm.models import forward
from distilvlm.models.adaptors import AdaptorConfig, Host
from distilvlm.models.decode import greedy
from tests import adaptor_hosts as tiny

WORKFLOWS = ["text", "seeing", "pointing"]
MIXED = ["text", "seeing", "pointing", "seeing"]


@pytest.mark.parametrize("workflow", ["seeing", "pointing"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding", "qwen3-tied"])
def test_cached_tokens_are_the_uncached_ones(kind: str, cache: str, workflow: str):
    """The prompt is longer than the window of the host that has one."""
    host, given = tiny.host(kind), tiny.ids()
    expected = tiny.greedy(host, workflow, given, use_cache=False)
    assert tiny.greedy(host, workflow, given, cache_implementation=cache).equal(expected)
    assert not tiny.greedy(host, "text", given).equal(expected)


@pytest.mark.parametrize("made", ["dynamic", "lazy", "static", "none"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding"])
def test_step_by_step_logits_are_those_of_one_pass(kind: str, made: str):
    host, given = tiny.host(kind), tiny.ids(length=12)
    config = host.model.config
    caches: dict[str, Any] = {
        "dynamic": lambda: DynamicCache(config=config),
        "lazy": DynamicCache,
        "static": lambda: StaticCache(config=config, max_cache_len=16),
        "none": lambda: None,
    }
    for workflow in (*WORKFLOWS, ["pointing", "text", "seeing"]):
        expected = tiny.logits(host, workflow, given)
        cache, pieces = caches[made](), []
        for piece in given.split([5, 1, 4, 1, 1], dim=1):
            with torch.no_grad(), host.use(workflow):
                out = host.model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        assert torch.cat(pieces, 1).allclose(expected, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding"])
def test_a_mixed_batch_writes_what_each_workflow_writes_alone(kind: str, cache: str):
    host, given = tiny.host(kind), tiny.ids(rows=4)
    mask = torch.ones_like(given)
    mask[0, :4] = mask[3, :2] = 0
    found = tiny.greedy(host, MIXED, given, attention_mask=mask, cache_implementation=cache)
    for row, name in enumerate(MIXED):
        alone = tiny.greedy(host, name, given, attention_mask=mask, cache_implementation=cache)
        assert found[row].equal(alone[row])


def test_slots_are_of_the_kind_of_the_frozen_layers_and_of_nobody_else():
    host, given = tiny.host("qwen2-sliding"), tiny.ids(length=9)
    slots = {name: range(host[name].slot, host[name].slot + len(host[name].layers)) for name in host.names}
    assert set(slots["seeing"]).isdisjoint(slots["pointing"]) and min(map(min, slots.values())) == 5
    with host.use(["text", "pointing", "pointing"]), torch.no_grad():
        cache = host.model(input_ids=given, use_cache=True).past_key_values
    base, own = cache.layers[:4], [cache.layers[slot] for slot in slots["pointing"]]
    assert [layer.is_sliding for layer in own] == [base[1].is_sliding, base[3].is_sliding] == [False, True]
    assert [tuple(layer.keys.shape[:1]) for layer in own] == [(2,), (2,)]
    assert [layer.keys.shape[2] for layer in own] == [9, 3]  # a window of 4 keeps 3
    assert len(cache.layers) == max(slots["pointing"]) + 1
    assert all(layer.keys is None for slot, layer in enumerate(cache.layers) if slot in slots["seeing"])
    with torch.no_grad():
        plain = host.model(input_ids=given, use_cache=True).past_key_values
    assert len(plain.layers) == 4


def test_a_later_adaptor_takes_the_slots_of_one_that_is_gone():
    host, given = tiny.host(), tiny.ids()
    freed = host["seeing"].slot
    host.remove("seeing")
    tiny.disturb(host.add("third", AdaptorConfig(positions=(0, 2, 3))).parameters())
    assert host["third"].slot == freed
    tiny.disturb(host.add("long", AdaptorConfig(positions=(0, 1, 2, 3))).parameters())
    assert host["long"].slot == host["pointing"].slot + 2
    names = ["third", "pointing", "long"]
    found = tiny.greedy(host, names, given)
    for row, name in enumerate(names):
        assert found[row].equal(tiny.greedy(host, name, given)[row])


@pytest.mark.parametrize(
    ("filled", "then"),
    [
        ("text", "seeing"),
        ("seeing", "text"),
        ("seeing", "pointing"),
        (["text", "seeing", "text"], "text"),
        (["text", "seeing", "text"], ["seeing", "text", "text"]),
    ],
)
def test_a_cache_of_another_workflow_is_refused_and_left_as_it_was(filled: Any, then: Any):
    host, given = tiny.host(), tiny.ids()
    cache: Any = DynamicCache(config=host.model.config)
    tiny.logits(host, filled, given, past_key_values=cache)
    with pytest.raises(ValueError, match=r"filled in workflow .*Start with a new cache"):
        tiny.logits(host, then, given[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == given.shape[1]
    expected = tiny.logits(host, filled, torch.cat([given, given[:, :1]], 1))[:, -1:]
    assert tiny.logits(host, filled, given[:, :1], past_key_values=cache).allclose(expected, atol=1e-4)


def test_a_cache_of_an_adaptor_that_was_replaced_is_refused():
    host, given = tiny.host(), tiny.ids()
    cache: Any = DynamicCache(config=host.model.config)
    tiny.logits(host, "seeing", given, past_key_values=cache)
    config = host["seeing"].config
    host.remove("seeing")
    host.add("seeing", config)
    with pytest.raises(ValueError, match="no workflow can read another's keys"):
        tiny.logits(host, "seeing", given[:, :1], past_key_values=cache)


@pytest.mark.parametrize("static", [True, False])
def test_an_emptied_cache_serves_any_workflow(static: bool):
    host, given, config = tiny.host(), tiny.ids(), tiny.model().config
    cache: Any = StaticCache(config=config, max_cache_len=12) if static else DynamicCache(config=config)
    for workflow in ("seeing", "pointing", "text", ["text", "seeing", "pointing"]):
        cache.reset()
        expected = tiny.logits(host, workflow, given)
        assert tiny.logits(host, workflow, given, past_key_values=cache).allclose(expected, atol=1e-5)


def test_a_conversation_switches_workflow_between_turns_by_reading_all_of_it_again():
    host, turn = tiny.host(), tiny.ids(rows=1)
    first = torch.cat([turn, tiny.greedy(host, "seeing", turn)], 1)
    second = tiny.greedy(host, "text", torch.cat([first, turn], 1))
    assert second.equal(tiny.model().generate(torch.cat([first, turn], 1), max_new_tokens=6, do_sample=False)[:, -6:])


def test_a_prefix_cache_is_used_again_by_its_workflow():
    host, given = tiny.host(), tiny.ids(rows=1)
    prefix: Any = DynamicCache(config=host.model.config)
    tiny.logits(host, "pointing", given, past_key_values=prefix)
    for seed in (1, 2):
        more = tiny.ids(rows=1, length=3, seed=seed)
        whole = torch.cat([given, more], 1)
        again = copy.deepcopy(prefix)
        found = tiny.logits(host, "pointing", more, past_key_values=again)
        assert found.allclose(tiny.logits(host, "pointing", whole)[:, -3:], atol=1e-4)
    prefix.crop(-4)
    found = tiny.logits(host, "pointing", given[:, -4:], past_key_values=prefix)
    assert found.allclose(tiny.logits(host, "pointing", given)[:, -4:], atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_of_one_workflow_are_those_without_a_cache(cache: str):
    host, given = tiny.host("qwen2"), tiny.ids()
    expected = tiny.greedy(host, "seeing", given, num_beams=3, use_cache=False)
    assert tiny.greedy(host, "seeing", given, num_beams=3, cache_implementation=cache).equal(expected)


def test_a_mixed_cache_refuses_to_be_reordered():
    host: Any = tiny.host()
    cache: Any = DynamicCache(config=host.model.config)
    tiny.logits(host, WORKFLOWS, tiny.ids(), past_key_values=cache)
    for change in (
        lambda: cache.reorder_cache(torch.tensor([1, 0, 2])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(ValueError, match="needs one workflow for the whole batch"):
            change()


def test_rows_leave_a_mixed_batch_with_their_keys():
    host, given, names = tiny.host("qwen2-sliding"), tiny.ids(rows=5), ["seeing", "text", "pointing", "seeing", "text"]
    more, cache = tiny.ids(rows=5, length=2, seed=1), DynamicCache(config=tiny.model("qwen2-sliding").config)
    expected = tiny.logits(host, names, torch.cat([given, more], 1))[:, -2:]
    left = list(range(5))
    with host.use(names), torch.no_grad():
        host.model(input_ids=given, past_key_values=cache)
        for step, staying in enumerate(([0, 2, 3, 4], [1, 2])):  # of the rows that are left: 2 and 3 of the first batch
            cache.batch_select_indices(torch.tensor(staying))
            host.select(staying)
            left = [left[row] for row in staying]
            found = host.model(input_ids=more[left, step : step + 1], past_key_values=cache).logits
            assert found.allclose(expected[left, step : step + 1], atol=1e-4)
        assert host.active == ("pointing", "seeing")
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(ValueError, match=r"where rows left the batch, say host\.select\(rows\), too"):
            host.model(input_ids=more[:2, :1], past_key_values=cache)


def test_greedy_decoding_lets_rows_of_a_mixed_batch_end_early(make, make_batch):
    """models.decode, from embedded prompts: every row's answer as in its workflow alone."""
    vlm = make("clip", "llama")
    host = Host.attach(vlm.model)
    for seed, name in enumerate(("seeing", "pointing")):
        tiny.disturb(host.add(name, AdaptorConfig(positions=(0, 1), projector=True)).parameters(), seed)
    names = ["seeing", "text", "pointing", "text", "seeing"]
    batch = make_batch(vlm, ["ab#", "cd#", "ef#", "gh#", "#ij"])
    features = forward.vision_features(vlm.model, vlm.layout, batch.pictures)

    def answers(workflow: str | list[str], ends: set[int]) -> list[list[int]]:
        with host.use(workflow):
            embedded = forward.embeddings(vlm.model, vlm.layout, batch, features)
            return greedy(vlm.model, embedded, batch.attention_mask, ends=ends, limit=8)

    alone = {name: answers(name, set()) for name in set(names)}
    whole = [alone[name][row] for row, name in enumerate(names)]
    ends = {whole[1][2], whole[0][4]}  # some rows end earlier than others
    expected = [row[: next((i for i, token in enumerate(row) if token in ends), 8)] for row in whole]
    assert len({len(row) for row in expected}) > 2
    assert answers(names, ends) == expected
    assert host.active == "text"


def test_caches_that_cannot_grow_are_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    host: Any = tiny.host()
    given: Tensor = tiny.ids()
    quantised: Any = QuantizedCache("fp8", host.model.config)
    with pytest.raises(ValueError, match="a cache of Fp8QuantizedLayer cannot be extended"):
        tiny.logits(host, "seeing", given, past_key_values=quantised)
    tiny.logits(host, "text", given, past_key_values=QuantizedCache("fp8", host.model.config))
    offloaded: Any = DynamicCache(config=host.model.config)
    monkeypatch.setattr(offloaded, "update", lambda keys, values, *_: (keys, values))  # without a second device
    offloaded.offloading = True
    with pytest.raises(ValueError, match="an offloaded cache moves its slots"):
        tiny.logits(host, "seeing", given, past_key_values=offloaded)
