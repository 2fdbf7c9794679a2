import pytest
import torch
from torch import nn

from distilvlm.models import fingerprint as module
from distilvlm.models.fingerprint import fingerprint


def model(seed=0, tied=True):
    torch.manual_seed(seed)
    net = nn.ModuleDict({"embed": nn.Embedding(7, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 7, bias=False)})
    if tied:
        net["head"].weight = net["embed"].weight
    return net


def test_equal_weights_have_equal_fingerprints_and_a_changed_bit_changes_it():
    net = model()
    assert fingerprint(net) == fingerprint(model())
    before = fingerprint(net)
    with torch.no_grad():
        net["norm"].weight[3] = torch.nextafter(net["norm"].weight[3], torch.tensor(2.0))
    assert fingerprint(net) != before


def test_saved_buffers_count():
    net = model()
    before = fingerprint(net)
    net["norm"].num_batches_tracked += 1  # a tensor without dimensions
    assert fingerprint(net) != before


def test_name_dtype_and_shape_count_even_where_the_bytes_are_the_same():
    seen = {
        fingerprint(nn.ParameterDict({name: nn.Parameter(value, requires_grad=False)}))
        for name, value in [
            ("a", torch.zeros(2, 3)),
            ("b", torch.zeros(2, 3)),
            ("a", torch.zeros(3, 2)),
            ("a", torch.zeros(2, 3, dtype=torch.int32)),
            ("a", torch.zeros(2, 6, dtype=torch.bfloat16)),
        ]
    }
    assert len(seen) == 5


def test_order_of_modules_layout_in_memory_and_gradients_do_not_count():
    left = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 3)})
    right = nn.ModuleDict({"b": left["b"], "a": left["a"]})
    assert fingerprint(left) == fingerprint(right)
    before = fingerprint(left)
    left.requires_grad_(False)
    left["a"].weight.data = left["a"].weight.data.t().contiguous().t()
    assert fingerprint(left) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_hashing_in_pieces_gives_the_same_hash(dtype, monkeypatch):
    net = model(tied=False).to(dtype)
    whole = fingerprint(net)
    monkeypatch.setattr(module, "PIECE", 24)
    assert fingerprint(net) == whole


def test_an_excluded_weight_does_not_count_nor_does_what_is_tied_to_it():
    net = model()
    before = fingerprint(net, exclude={"embed.weight"})
    with torch.no_grad():
        net["embed"].weight += 1
    assert fingerprint(net, exclude={"embed.weight"}) == before != fingerprint(net)
    loose = model(tied=False)
    before = fingerprint(loose, exclude={"embed.weight"})
    with torch.no_grad():
        loose["head"].weight += 1
    assert fingerprint(loose, exclude={"embed.weight"}) != before


def test_a_name_that_is_not_there_and_a_model_without_values_are_refused():
    with pytest.raises(ValueError, match="named embed"):
        fingerprint(model(), exclude={"embed.wieght"})
    with pytest.raises(ValueError, match="meta device"):
        fingerprint(nn.Linear(2, 2, device="meta"))
