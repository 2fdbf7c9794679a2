"""Cutting a language model: which layers stay, and that they are the same layers afterwards."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from distilvlm.models.language import cut, cut_config, kept_layers, require_plain_head

TINY = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("total", range(1, 31))
def test_a_number_keeps_first_and_last_and_spaces_the_rest_evenly(total):
    for number in range(2, total + 1):
        kept = kept_layers(total, number)
        assert (len(kept), kept[0], kept[-1]) == (number, 0, total - 1)
        steps = {b - a for a, b in itertools.pairwise(kept)}
        assert min(steps) >= 1 and max(steps) - min(steps) <= 1
    assert kept_layers(total, None) == list(range(total)) == kept_layers(total, total)


def test_published_spacings():
    assert kept_layers(30, 4) == [0, 10, 19, 29]
    assert kept_layers(24, 12) == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    assert kept_layers(24, 1) == [0]
    assert kept_layers(24, [3, 4, 23]) == [3, 4, 23]


@pytest.mark.parametrize("layers", [0, 5, -1, [], [0, 4], [-1, 2], [2, 1], [1, 1]])
def test_layers_that_cannot_be_kept_are_refused(layers):
    with pytest.raises(ValueError, match=r"language\.layers"):
        kept_layers(4, layers)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_a_cut_model_is_its_kept_layers_in_order(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(num_hidden_layers=5, **TINY)).eval()
    ids = torch.randint(0, 20, (2, 6))
    kept = [0, 2, 4]

    # By hand, with the uncut model: the layers that go hand on what they get.
    dropped = [model.model.layers[i].register_forward_hook(lambda _, inputs, __: inputs[0]) for i in (1, 3)]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for hook in dropped:
        hook.remove()

    cut(model, kept)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
        assert torch.equal(generated, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
    assert model.config.num_hidden_layers == model.model.config.num_hidden_layers == 3


def test_a_cut_model_saves_and_loads_as_an_ordinary_one(tmp_path):
    model = AutoModelForCausalLM.from_config(Qwen3Config(num_hidden_layers=4, **TINY)).eval()
    cut(model, [1, 3])
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_each_kept_layer_keeps_its_kind_of_attention():
    """With a sliding window on the last layers only, a cut keeps the window with the layers that had it."""
    config = Qwen2Config(
        num_hidden_layers=6, use_sliding_window=True, sliding_window=2, max_window_layers=4, **TINY
    )  # layers 4 and 5 slide
    assert cut_config(config, [0, 3, 5]).layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert config.num_hidden_layers == 6 and len(config.layer_types) == 6

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    cut(model, [0, 5])
    rebuilt = AutoModelForCausalLM.from_config(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    ids = torch.randint(0, 20, (1, 9))
    with torch.no_grad():
        assert torch.equal(rebuilt(ids).logits, model(ids).logits)


def test_logits_that_llava_would_not_reproduce_are_refused():
    from transformers import GraniteConfig

    config = GraniteConfig(num_hidden_layers=1, logits_scaling=4.0, **TINY)
    with pytest.raises(ValueError, match="a scale"):
        require_plain_head(AutoModelForCausalLM.from_config(config).eval())
    require_plain_head(AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **TINY)).eval())
