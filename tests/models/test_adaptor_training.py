"""Gradients of an adaptor: equal however they are computed, and none for the model that it stands in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from distilvlm.models.adaptors import AdaptorConfig, Host
from tests import adaptor_hosts as tiny


def gradients(host: Host, workflow: str | list[str], given: Tensor) -> dict[str, Tensor]:
    """Of a loss in training mode, of all adaptors' parameters that have one."""
    host.model.train()
    host.adaptors.train()
    host.adaptors.zero_grad(set_to_none=True)
    with host.use(workflow):
        host.model(input_ids=given, labels=given).loss.backward()
    return {name: p.grad.clone() for name, p in host.adaptors.named_parameters() if p.grad is not None}


def checkpointed(host: Host, **options: Any) -> None:
    host.model.activation_checkpointing_enable({"use_reentrant": False, **options})


@pytest.mark.parametrize("workflow", ["seeing", "pointing", ["pointing", "text", "seeing"]])
@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding"])
def test_checkpointing_leaves_gradients_as_they_are(kind: str, workflow: Any):
    host, given, runs = tiny.host(kind), tiny.ids(), []
    expected = gradients(host, workflow, given)
    for module in host.adaptors.modules():
        if hasattr(module, "mlp"):
            module.mlp.register_forward_pre_hook(lambda *_: runs.append("an inserted layer"))
    layers = sum(len(host[name].layers) for name in host.names if name in workflow)
    checkpointed(host)
    found = gradients(host, workflow, given)
    assert len(runs) == 2 * layers
    assert found.keys() == expected.keys()
    assert all(found[name].allclose(expected[name], atol=1e-6) for name in expected)
    host.model.activation_checkpointing_disable()
    runs.clear()
    assert all(value.equal(expected[name]) for name, value in gradients(host, workflow, given).items())
    assert len(runs) == layers


def test_every_parameter_of_the_active_adaptor_gets_a_gradient_and_nothing_else():
    host, given = tiny.host(), tiny.ids()
    for name in host.names:
        found = gradients(host, name, given)
        assert {key.split(".")[0] for key in found} == {name}
        assert set(found) == {f"{name}.{key}" for key, _ in host[name].named_parameters()}
        assert all(value.abs().max() > 0 for value in found.values())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in host.model.parameters())


def test_layers_train_behind_an_embedding_that_is_frozen():
    """No input of theirs needs a gradient: reentrant checkpointing would leave them without one, in silence."""
    host = tiny.host("llama", one=AdaptorConfig(positions=(0, 2), own_embedding=False))
    checkpointed(host)
    found = gradients(host, "one", tiny.ids())
    assert all(value.abs().max() > 0 for value in found.values())
    assert len(found) == len(list(host["one"].parameters()))
    host.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"loses the gradient .*\{'use_reentrant': False\}"):
        gradients(host, "one", tiny.ids())


def test_rows_of_a_mixed_batch_give_the_gradients_that_they_give_alone():
    host, given = tiny.host(), tiny.ids(rows=4)
    names = ["seeing", "pointing", "text", "seeing"]
    mixed = gradients(host, names, given)
    share: dict[str, Tensor] = {}
    for name in ("seeing", "pointing"):
        rows = [row for row, other in enumerate(names) if other == name]
        share |= {key: value * len(rows) / 4 for key, value in gradients(host, name, given[rows]).items()}
    assert mixed.keys() == share.keys()
    assert all(mixed[key].allclose(share[key], atol=1e-6) for key in share)


def test_gates_of_zero_train_first_and_then_their_layers():
    """At zero a gate's own weight has a gradient, what stands behind it has none until the gate has moved."""
    host = Host.attach(tiny.model())
    host.add("gated", AdaptorConfig(positions=(1, 3), structure="b"))
    for step in range(2):
        found = gradients(host, "gated", tiny.ids())
        assert all(found[f"gated.gates.{k}.weight"].abs().max() > 0 for k in (0, 1))
        moved = [bool(value.abs().max() > 0) for key, value in found.items() if ".layers." in key]
        assert all(moved) if step else not any(moved)
        with torch.no_grad():
            for key, parameter in host["gated"].named_parameters():
                parameter.sub_(0.1 * found[f"gated.{key}"])


def test_no_cache_is_written_while_layers_are_checkpointed():
    host, given = tiny.host(), tiny.ids()
    checkpointed(host)
    host.model.train()
    host.adaptors.eval()  # transformers itself minds the layers that train only
    with host.use("seeing"):
        cache: Any = DynamicCache(config=host.model.config)
        out = host.model(input_ids=given, past_key_values=cache, use_cache=True)
        again = host.model(input_ids=given, use_cache=False)
    assert cache.get_seq_length() == 0 and len(cache.layers) == 4
    assert out.logits.equal(again.logits)


def test_a_checkpoint_of_the_whole_pass_works_too():
    """As engines wrap a model: the pass runs again inside backward, in the workflow that is set."""
    host, given = tiny.host(), tiny.ids()
    expected = gradients(host, "pointing", given)
    host.adaptors.zero_grad(set_to_none=True)
    host.set("pointing")
    forward: Any = lambda ids: host.model(input_ids=ids, labels=ids).loss  # noqa: E731
    checkpoint(forward, given, use_reentrant=False).backward()
    found = {name: p.grad for name, p in host.adaptors.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(found[name].allclose(expected[name], atol=1e-6) for name in expected)
