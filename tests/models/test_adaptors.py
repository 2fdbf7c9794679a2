"""Inserted layers and tables beside a frozen model: what they compute, and that the model stays what it was."""

from __future__ import annotations

import copy
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from distilvlm.models.adaptors import AdaptorConfig, Host, resolve
from tests import adaptor_hosts as tiny

HOSTS = list(tiny.HOSTS)


def trained(host: Host, name: str, steps: int = 2) -> None:
    """A few updates of an adaptor, as a training would make them."""
    optimiser = torch.optim.AdamW(host[name].parameters(), lr=1e-2)
    host.set(name)
    for step in range(steps):
        given = tiny.ids(seed=step)
        host.model(input_ids=given, labels=given).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    host.set("text")


@pytest.mark.parametrize("kind", HOSTS)
def test_text_is_the_plain_model_to_the_bit(kind: str):
    plain, given = tiny.model(kind), tiny.ids()
    expected, state = plain(given, output_hidden_states=True), copy.deepcopy(plain.state_dict())
    written = plain.generate(given, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model = tiny.model(kind)
    host = Host.attach(model)
    assert model(given).logits.equal(expected.logits)
    host.add("seeing", AdaptorConfig(positions=tiny.PLACES))
    trained(host, "seeing")
    found = model(given, output_hidden_states=True)
    assert not tiny.logits(host, "seeing", given).allclose(expected.logits, atol=0.1)
    assert all(a.equal(b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))
    assert found.logits.equal(expected.logits)
    assert model.generate(given, max_new_tokens=6, do_sample=False, pad_token_id=0).equal(written)
    assert type(model) is type(plain)
    assert model.state_dict().keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", HOSTS)
def test_a_fresh_adaptor_of_structure_c_runs_its_layers_twice(kind: str):
    host, given = Host.attach(tiny.model(kind)), tiny.ids()
    host.add("copied", AdaptorConfig(positions=tiny.PLACES))
    twice = [layer for layer in range(4) for _ in range(2 if layer in tiny.PLACES else 1)]
    model = tiny.model(kind)
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in twice)
    model.config.num_hidden_layers = len(twice)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in twice]
    assert tiny.logits(host, "copied", given).equal(model(given, use_cache=False).logits)


@pytest.mark.parametrize("structure", ["a", "b"])
@pytest.mark.parametrize("gate", ["linear", "scalar"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding"])
def test_gates_of_zero_leave_the_model_as_it_is(kind: str, structure: Any, gate: Any):
    host, given = Host.attach(tiny.model(kind)), tiny.ids()
    host.add("gated", AdaptorConfig(positions=(1, 3), structure=structure, gate=gate))
    assert tiny.logits(host, "gated", given).equal(tiny.logits(host, "text", given))
    assert tiny.greedy(host, "gated", given).equal(tiny.greedy(host, "text", given))


@pytest.mark.parametrize("gate", ["linear", "scalar"])
@pytest.mark.parametrize("structure", ["a", "b", "c"])
def test_layers_stand_where_their_structure_says(structure: Any, gate: Any):
    """Against a loop over the layers that shares nothing with the hooks."""
    places = (0, 2)
    host = tiny.host("llama", one=AdaptorConfig(positions=places, structure=structure, gate=gate))
    base, own, given = tiny.model("llama").model, host["one"], tiny.ids()
    with torch.no_grad():
        hidden = own.embed_tokens(given)
        turn = base.rotary_emb(hidden, torch.arange(given.shape[1])[None])
        chain: Tensor | None = None
        for number, layer in enumerate(base.layers):
            before, hidden = hidden, layer(hidden, position_embeddings=turn)
            if number not in places:
                continue
            k = places.index(number)
            if structure == "c":
                hidden = own.layers[k](hidden, position_embeddings=turn)
            elif structure == "b":
                hidden = hidden + own.gates[k](own.layers[k](hidden, position_embeddings=turn))
            else:
                chain = own.layers[k](before if chain is None else chain, position_embeddings=turn)
                hidden = hidden + own.gates[k](chain)
        expected = own.lm_head(own.norm(hidden))
    assert tiny.logits(host, "one", given).allclose(expected, atol=1e-5)


@pytest.mark.parametrize("part", ["own_embedding", "own_norm", "own_head"])
def test_parts_that_are_not_its_own_are_the_hosts(part: str):
    config: dict[str, Any] = {part: False, "structure": "b"}
    host, given = Host.attach(tiny.model()), tiny.ids()
    made = host.add("gated", AdaptorConfig(positions=(1,), **config))
    own = {"own_embedding": "embed_tokens", "own_norm": "norm", "own_head": "lm_head"}
    assert [name for name in own.values() if getattr(made, name) is None] == [own[part]]
    assert tiny.logits(host, "gated", given).equal(tiny.logits(host, "text", given))
    for name in own.values():
        if (module := getattr(made, name)) is not None:
            before = tiny.logits(host, "gated", given)
            tiny.disturb(module.parameters())
            assert not tiny.logits(host, "gated", given).allclose(before, atol=1e-3)


@pytest.mark.parametrize(("kind", "tied"), [("llama-tied", None), ("llama", True), ("llama-tied", False)])
def test_tables_are_tied_as_the_hosts_are_or_as_is_asked(kind: str, tied: bool | None):
    host = Host.attach(tiny.model(kind))
    made = host.add("one", AdaptorConfig(positions=(1,), tied=tied))
    assert made.embed_tokens is not None and made.lm_head is not None
    assert made.config.tied is (kind == "llama-tied" if tied is None else tied)
    assert (made.lm_head.weight is made.embed_tokens.weight) is made.config.tied
    tables = 1 if made.config.tied else 2
    layer = sum(p.numel() for p in host.base.layers[0].parameters())
    assert host.bytes("one") == 4 * (layer + 24 + tables * 40 * 24)


def test_an_adaptor_shares_no_memory_with_what_it_copies():
    host = tiny.host()
    host.add("again", host["seeing"].config, start="seeing")
    places = [{p.data_ptr() for p in tree.parameters()} for tree in (host.model, *(host[name] for name in host.names))]
    assert len(set.union(*places)) == sum(map(len, places))
    assert tiny.logits(host, "again", tiny.ids()).equal(tiny.logits(host, "seeing", tiny.ids()))
    assert all(p.requires_grad for p in host["again"].parameters())
    with pytest.raises(ValueError, match=r"of another form \(positions: \[0, 2, 3\], not \[1\]\)"):
        host.add("other", AdaptorConfig(positions=(1,)), start="seeing")


def test_hidden_states_are_what_the_next_layer_reads_whoever_asked_first():
    given = tiny.ids()
    asked_before = tiny.model()
    asked_before(given, output_hidden_states=True)  # transformers then has hooks of its own on the layers
    found: list[Any] = []
    for model in (asked_before, tiny.model()):
        host = Host.attach(model)
        tiny.disturb(host.add("one", AdaptorConfig(positions=(1,))).parameters())
        with host.use("one"), torch.no_grad():
            found.append(model(given, output_hidden_states=True).hidden_states)
    read: list[Tensor] = []
    host.base.layers[2].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    tiny.logits(host, "one", given)
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    assert len(found[0]) == 5
    assert found[0][2].equal(read[0])


def test_removed_adaptors_leave_nothing_and_others_as_they_are():
    host, given = tiny.host(), tiny.ids()
    kept = tiny.logits(host, "pointing", given)
    held = {name: host.bytes(name) for name in host.names}
    assert held == {n: sum(p.numel() * 4 for p in host[n].parameters()) for n in ("seeing", "pointing")}
    assert host.bytes("text") == sum(p.numel() * 4 for p in host.model.parameters())
    with host.use("seeing"), pytest.raises(ValueError, match="'seeing' is active"):
        host.remove("seeing")
    host.remove("seeing")
    assert host.names == ("pointing",)
    assert [len(layer._forward_hooks) for layer in host.base.layers] == [0, 1, 0, 1]
    assert tiny.logits(host, "pointing", given).equal(kept)
    with pytest.raises(ValueError, match="there is no adaptor 'seeing': there is pointing"):
        host.set("seeing")
    host.detach()
    assert Host.of(host.model) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.model.modules())


def test_a_copied_model_has_a_host_of_its_own():
    host, given = tiny.host(), tiny.ids()
    expected = tiny.logits(host, "seeing", given)
    other = Host.of(copy.deepcopy(host.model))
    assert other is not None and other is not host
    tiny.disturb(host["seeing"].parameters())
    assert tiny.logits(other, "seeing", given).equal(expected)
    assert not tiny.logits(host, "seeing", given).equal(expected)


def test_each_row_of_a_mixed_batch_gets_what_its_workflow_gives_alone():
    """The same batch in one workflow: row by row to rounding, because products run on fewer rows."""
    given = tiny.ids(rows=5)
    names = ["text", "seeing", "pointing", "text", "seeing"]
    mask = torch.ones_like(given)
    mask[1, :3] = mask[3, :2] = 0  # left-padded
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for kind in ("llama", "qwen2-sliding", "qwen3-tied"):
        host = tiny.host(kind)
        mixed = tiny.logits(host, names, given, attention_mask=mask, position_ids=positions)
        for row, name in enumerate(names):
            alone = tiny.logits(host, name, given, attention_mask=mask, position_ids=positions)
            assert mixed[row][mask[row].bool()].allclose(alone[row][mask[row].bool()], atol=1e-5)


def test_the_bases_head_is_not_multiplied_for_rows_that_have_their_own():
    host, seen = tiny.host(), []
    host.base.lm_head.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[0]))
    for workflow in ("text", "seeing", ["text", "seeing", "pointing"]):
        tiny.logits(host, workflow, tiny.ids())
    assert seen == [3, 0, 1]


def test_a_batch_of_other_size_than_workflows_is_refused():
    host = tiny.host()
    with pytest.raises(ValueError, match="workflows are given for 2 rows, the batch has 3"):
        tiny.logits(host, ["text", "seeing"], tiny.ids())
    with pytest.raises(ValueError, match="need one workflow for the whole batch"):
        tiny.greedy(host, ["text", "seeing", "seeing"], tiny.ids(), num_beams=2)
    with host.use(["text", "seeing"]), pytest.raises(ValueError, match="each has its own lm_head"):
        host.head_weight()
    with pytest.raises(ValueError, match="no workflow is given: name one, or one for each row of the batch"):
        host.set([])


def test_a_stock_llava_shows_each_rows_pictures_through_its_own_projector(make, make_batch):
    """`generate` and forward of the plain class, with pixels; rows of all workflows in one batch."""
    vlm = make("clip", "llama", language_config={"vocab_size": 29 + 3})
    assert not vlm.image_id_is_virtual
    host = Host.attach(vlm.model)
    for seed, name in enumerate(("seeing", "pointing")):
        tiny.disturb(host.add(name, AdaptorConfig(positions=(0, 1), projector=True)).parameters(), seed)
    batch = make_batch(vlm, ["a#b", "c#d", "ef#", "#gh"])
    given = batch.input_ids.clone()
    given.view(-1)[batch.placeholder_rows] = vlm.image_id
    pixels = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    names = ["seeing", "text", "pointing", "seeing"]
    mixed = tiny.logits(host, names, given, pixel_values=pixels)
    for row, name in enumerate(names):
        alone = tiny.logits(host, name, given, pixel_values=pixels)[row]
        assert mixed[row].allclose(alone, atol=1e-5)
    assert not mixed[0].allclose(tiny.logits(host, "pointing", given, pixel_values=pixels)[0], atol=1e-2)
    # Embeddings don't say where placeholders are.
    with host.use(names), pytest.raises(ValueError, match="and nothing says to which rows they belong: give the Llava"):
        vlm.model(inputs_embeds=vlm.model.get_input_embeddings()(given), pixel_values=pixels)
    with host.use("seeing"):
        assert host.projector() is host["seeing"].projector
    assert host.projector() is vlm.model.model.multi_modal_projector


def test_a_workflow_ends_with_its_block_and_another_thread_is_not_let_in():
    host = tiny.host()
    host.set("pointing")
    refused: list[str] = []

    def other() -> None:
        assert host.active == "seeing"  # a streamer's thread runs in the workflow of who started it
        try:
            with host.use("text"):
                pass
        except RuntimeError as error:
            refused.append(str(error))

    with pytest.raises(KeyError), host.use("seeing"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with host.use("text"):
            assert host.active == "text"
        assert host.active == "seeing"
        raise KeyError
    assert host.active == "pointing"
    assert len(refused) == 1 and "another thread uses this model in workflow seeing" in refused[0]


@pytest.mark.parametrize(
    ("wanted", "depth", "positions"),
    [
        (8, 32, (3, 7, 11, 15, 19, 23, 27, 31)),
        (3, 7, (1, 3, 6)),
        (1, 5, (4,)),
        (5, 5, (0, 1, 2, 3, 4)),
        ([0, 3], 4, (0, 3)),
        ("iaa-14", 32, (0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31)),
    ],
)
def test_positions(wanted: Any, depth: int, positions: tuple[int, ...]):
    assert resolve(wanted, depth) == positions


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (9, "9 layers cannot be inserted behind 8"),
        (0, "0 layers cannot"),
        ("iaa-14", "'iaa-14' is for a host of 32 layers, this one has 8"),
        ("iaa-8", "no published positions are called 'iaa-8': there is iaa-14"),
        ([3, 3], "each once, in ascending order"),
        ([8], "do not fit a host of 8 layers"),
        ([], "do not fit"),
    ],
)
def test_positions_that_do_not_fit_are_refused(wanted: Any, told: str):
    with pytest.raises(ValueError, match=told):
        resolve(wanted, 8)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"positions": (2, 1)}, "give every layer once"),
        ({"structure": "d"}, "structure is 'd'"),
        ({"gate": "vector"}, "gate is 'vector'"),
        ({"tied": True, "own_head": False}, "only an own embedding and an own head can be one table"),
    ],
)
def test_forms_that_mean_nothing_are_refused(changes: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        AdaptorConfig(**{"positions": (1,), **changes})


def test_a_configuration_survives_json_and_refuses_what_it_does_not_know():
    config = AdaptorConfig(positions=(1, 3), structure="a", gate="scalar", own_norm=False, projector=True)
    assert AdaptorConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="unknown entries heads"):
        AdaptorConfig.from_json(config.to_json() | {"heads": 2})


@pytest.mark.parametrize("name", ["text", "base", "Seeing", "a.b", "keys", ""])
def test_names_that_mean_something_else_are_refused(name: str):
    with pytest.raises(ValueError, match="cannot be an adaptor's name"):
        Host.attach(tiny.model()).add(name, AdaptorConfig(positions=(1,)))


def test_what_a_host_lacks_is_told():
    host = tiny.host()
    with pytest.raises(ValueError, match="there is an adaptor 'seeing' already"):
        host.add("seeing", AdaptorConfig(positions=(1,)))
    with pytest.raises(ValueError, match="do not fit a host of 4 layers"):
        host.add("deep", AdaptorConfig(positions=(4,)))
    with pytest.raises(ValueError, match="needs a host that sees"):
        host.add("sees", AdaptorConfig(positions=(1,), projector=True))


def test_a_decoder_with_other_names_is_told_by_a_map():
    model = tiny.model()
    decoder: Any = model.model
    decoder.closing = decoder._modules.pop("norm")
    with pytest.raises(ValueError, match=r"has none of norm, .*parts=\{'norm': 'its.name.in.the.model'\}"):
        Host.attach(model)
    assert Host.attach(model, parts={"norm": "model.closing"}).base.norm is decoder.closing


def test_resized_tables_are_the_adaptors_too():
    host, given = tiny.host("llama-tied", one=AdaptorConfig(positions=(1,))), tiny.ids()
    before = tiny.logits(host, "one", given)
    host.model.resize_token_embeddings(43)
    with pytest.raises(ValueError, match=r"use host\.resize_token_embeddings"):
        tiny.logits(host, "one", given)
    host = tiny.host("llama-tied", one=AdaptorConfig(positions=(1,)))
    host.resize_token_embeddings(43)
    after = tiny.logits(host, "one", given)
    assert after.shape[-1] == 43 and after[..., :40].equal(before)
    assert tiny.logits(host, "one", torch.tensor([[42, 1]])).isfinite().all()
    assert host["one"].lm_head.weight is host["one"].embed_tokens.weight
    assert [name for name, p in host.model.named_parameters() if p.requires_grad] == []


def test_an_adaptor_in_fp32_runs_over_a_base_in_bf16():
    """What trains is held in fp32; outside of autocast nobody casts but the hooks."""
    host = Host.attach(tiny.model().bfloat16())
    tiny.disturb(host.add("one", AdaptorConfig(positions=(1, 3))).float().parameters(), by=0.01)
    whole = tiny.host("llama", one=AdaptorConfig(positions=(1, 3)))
    whole.model.load_state_dict(host.model.float().state_dict())
    whole["one"].load_state_dict(host["one"].state_dict())
    host.model.bfloat16()
    given = tiny.ids()
    found, expected = tiny.logits(host, "one", given), tiny.logits(whole, "one", given)
    assert found.dtype == torch.float32
    assert found.allclose(expected, atol=0.05 * float(expected.abs().max()))
    mixed = tiny.logits(host, ["one", "text", "one"], given)
    assert mixed[0].allclose(found[0], atol=1e-3)


def test_what_an_adaptor_is_stands_in_the_log(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="distilvlm"):
        tiny.host("llama", one=AdaptorConfig(positions=(1, 3)))
    assert "adaptor 'one': structure c, 2 layers behind [1, 3]" in caplog.text


def test_a_real_model_speaks_as_before():
    """SmolLM2-135M: below $DISTILVLM_WEIGHTS, as `distilvlm prepare` writes it."""
    directory = Path(os.environ.get("DISTILVLM_WEIGHTS", "weights")) / "smollm2-135m"
    if not directory.is_dir():
        pytest.skip(f"no {directory}: set DISTILVLM_WEIGHTS to a directory that holds smollm2-135m/")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert isinstance(model, LlamaForCausalLM)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    given = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        expected = model(**given).logits
    written = model.generate(**given, max_new_tokens=8, do_sample=False)
    host = Host.attach(model)
    host.add("seeing", AdaptorConfig(positions=resolve(2, host.base.depth)))
    host.add("pointing", AdaptorConfig(positions=resolve(2, host.base.depth), structure="a"))
    trained(host, "seeing", steps=1)
    with torch.no_grad():
        assert model(**given).logits.equal(expected)
        assert not tiny.logits(host, "seeing", given["input_ids"]).allclose(expected, atol=0.1)
    assert tiny.logits(host, "pointing", given["input_ids"]).equal(expected)  # its gates are zero
    assert model.generate(**given, max_new_tokens=8, do_sample=False).equal(written)
    with host.use("seeing"):
        cached = model.generate(**given, max_new_tokens=4, do_sample=False)
        assert cached.equal(model.generate(**given, max_new_tokens=4, do_sample=False, use_cache=False))
