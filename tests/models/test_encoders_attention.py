"""Importance: exactly the stock attentions, from one row of one layer, with the fast kernel left in place."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from distilvlm.models.encoders import attention, build_encoder, cls_attention, importance_of, query_of, regrid
from distilvlm.models.encoders.importance import clipped
from distilvlm.recipe.encoders import EncoderSpec

from .encoder_models import CONFIGS, WITH_CLS, canvases, encoder


def eager(built, pixels, layer=-2):
    """The stock class's attention weights of the block that gives hidden state `layer`: [pictures, heads, T, T]."""
    config = AutoConfig.for_model(**CONFIGS[built.name])
    whole = AutoModel.from_config(config, attn_implementation="eager").eval()
    whole.load_state_dict(built.model.state_dict(), strict=False)
    with torch.no_grad():
        return whole(pixels, output_attentions=True).attentions[layer % 5 - 1]


@pytest.mark.parametrize("family", WITH_CLS)
@pytest.mark.parametrize("layer", [-2, 1])
def test_cls_rows_are_those_of_eager_attention(family, layer):
    built = encoder(family, layer=layer)
    pixels = built.pixels(canvases())
    row = eager(built, pixels, layer)[:, :, 0, -36:]
    seen = built.see(pixels, importance=True)
    assert row.std() > 1e-3  # far from uniform, or nothing would be compared
    torch.testing.assert_close(seen.attention, row, atol=1e-6, rtol=0)
    paper = (row / row.sum(-1, keepdim=True)).mean(1)
    torch.testing.assert_close(seen.importance, paper, atol=1e-6, rtol=0)
    torch.testing.assert_close(cls_attention(built.model, -1, pixels), row, atol=1e-6, rtol=0)  # it is cut there


@pytest.mark.parametrize("family", [*WITH_CLS, "siglip", "siglip-headless"])
def test_asking_for_importance_changes_no_token_and_leaves_no_trace(family):
    built = encoder(family)
    pixels = built.pixels(canvases())
    had = built.model.config._attn_implementation
    seen = built.see(pixels, importance=True)
    assert torch.equal(seen.tokens, built.see(pixels).tokens)
    assert built.model.config._attn_implementation == had == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in built.model.modules())
    torch.testing.assert_close(seen.importance.sum(-1), torch.ones(3))


def test_a_failing_forward_leaves_no_trace_either():
    built = encoder("clip")
    with pytest.raises(RuntimeError), attention.watched(built.model, 0, attention.from_cls):
        built.model(torch.zeros(1, 4, 24, 24))
    assert built.model.config._attn_implementation == "sdpa"


def test_siglips_importance_is_what_its_pooling_head_attends_to():
    built = encoder("siglip")
    pixels = built.pixels(canvases())
    with torch.no_grad():
        last = built.model(pixels).last_hidden_state
        head = built.model.head
        _, expected = head.attention(head.probe.repeat(3, 1, 1), last, last)  # [3, 1, 36], heads averaged
    seen = built.see(pixels, importance=True)
    torch.testing.assert_close(seen.importance, expected[:, 0], atol=1e-6, rtol=0)
    assert seen.cls is None


def test_without_cls_or_head_importance_is_received_attention_clipped():
    built = encoder("siglip-headless")
    pixels = built.pixels(canvases())
    columns = eager(built, pixels).mean(2)  # over queries: [3, heads, 36]
    seen = built.see(pixels, importance=True)
    torch.testing.assert_close(seen.attention, columns, atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.importance, clipped(columns.mean(1)), atol=1e-6, rtol=0)
    assert (seen.importance.max(-1).values < columns.mean(1).max(-1).values).all()


def test_clipping_cuts_the_outlier_and_nothing_else():
    weights = torch.full((1, 100), 0.001)
    weights[0, 3] = 0.901
    cut = clipped(weights)
    torch.testing.assert_close(cut, torch.full((1, 100), 0.01))


def test_attention_to_other_keys_does_not_count():
    """Two heads: one gives its patches half of its attention, the other nearly nothing; each counts as one."""
    rows = torch.tensor([[[0.1, 0.4], [3e-9, 1e-9]]])
    torch.testing.assert_close(importance_of(rows), torch.tensor([[(0.2 + 0.75) / 2, (0.8 + 0.25) / 2]]))


def test_an_importance_map_keeps_its_places_on_another_grid():
    weights = torch.zeros(1, 16)
    weights[0, 3] = 1.0  # top right of 4×4
    assert regrid(weights, (4, 4), (2, 2)).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    finer = regrid(weights, (4, 4), (8, 8))
    torch.testing.assert_close(finer.sum(), torch.tensor(1.0))
    assert finer.argmax() == 7  # the top right of 8×8
    assert regrid(weights, (4, 4), (4, 4)) is weights


def test_the_query_is_cls_or_the_mean_of_tokens_weighted_by_importance():
    built = encoder("dinov2")
    seen = built.see(built.pixels(canvases()), importance=True)
    assert query_of(seen) is seen.cls
    built = encoder("siglip")
    seen = built.see(built.pixels(canvases()), importance=True)
    expected = torch.stack([i @ t for i, t in zip(seen.importance, seen.tokens, strict=True)])
    torch.testing.assert_close(query_of(seen), expected)
    with pytest.raises(ValueError, match="needs importance"):
        query_of(built.see(built.pixels(canvases())))


def test_no_layer_but_a_blocks_has_attention():
    built = encoder("clip")
    pixels = built.pixels(canvases())
    with pytest.raises(ValueError, match="before all blocks"):
        cls_attention(built.model, 0, pixels)
    with pytest.raises(ValueError, match="no CLS token"):
        cls_attention(encoder("siglip").model, -2, pixels)
    assert not encoder("clip", layer=0).gives_importance


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (
            {"model_type": "data2vec-vision"},
            "Data2VecVisionModel ran the attention of a block 0 times through transformers' interface",
        ),
        (
            {"model_type": "beit", "use_relative_position_bias": True},
            "BeitAttention adds a mask or bias to its logits: its rows cannot be read",
        ),
    ],
)
def test_attention_that_is_not_queries_times_keys_alone_is_refused(facts, told):
    built = build_encoder(EncoderSpec.model_validate({"config": CONFIGS["clip"] | facts}), "odd", seed=0)
    with pytest.raises(ValueError, match=told):
        built.see(built.pixels(canvases()), importance=True)
