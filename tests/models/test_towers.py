"""Layouts: every patch is a visual token and nothing else is, for towers known and unknown."""

import pytest

VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = VIT | {"vocab_size": 30, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PIXELS = {"image_size": 12, "patch_size": 4}
LM = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 40}


@pytest.mark.parametrize(
    ("vision", "changes", "placeholders", "registers", "strategy"),
    [
        ("clip", {}, 9, [], "default"),
        ("clip-full", {}, 10, [0], "full"),
        ("siglip", {}, 9, [], "full"),
        ("siglip-default", {}, 8, [], "default"),  # the published 728 of 729
        ("dinov2", {}, 4, [], "default"),
        ("dinov2", {"size": 20}, 25, [], "default"),
        ("dinov2-registers", {}, 13, [0, 1, 2, 3], "default"),
        ("dinov2-registers", {"select": "full"}, 14, [0, 1, 2, 3, 4], "full"),
    ],
)
def test_every_patch_is_a_visual_token_and_nothing_else(make, vision, changes, placeholders, registers, strategy):
    vlm = make(vision, "llama", **changes)
    assert vlm.layout.placeholders == placeholders == vlm.model.config.image_seq_length
    assert [i for i, is_patch in enumerate(vlm.layout.visual) if not is_patch] == registers
    assert vlm.layout.select == strategy == vlm.model.config.vision_feature_select_strategy


def test_a_tower_that_is_in_no_table_is_understood_by_trying(make):
    facts = {"model_type": "dinov3_vit", "num_register_tokens": 2, **VIT, **PIXELS}
    layout = make("clip", "llama", config=facts, size=8).layout
    assert layout.visual == (False, False, True, True, True, True)


def test_a_convolutional_pyramid_is_refused_by_name(make):
    with pytest.raises(ValueError, match=r"'convnext'.*no patch tokens"):
        make("clip", "llama", config={"model_type": "convnext"})


def test_a_tower_whose_tokens_shrink_is_refused(make):
    facts = {"model_type": "swin", "image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8}
    with pytest.raises(ValueError, match="'swin' cannot be"):
        make("clip", "llama", config=facts | {"depths": [1, 1], "num_heads": [2, 2]})


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_a_size_that_needs_interpolation_is_refused_where_llava_does_not_ask_for_it(make, vision):
    with pytest.raises(ValueError, match="12 px only, not 16 px"):
        make(vision, "llama", size=16)


def test_a_layer_that_is_not_there_is_refused(make):
    with pytest.raises(ValueError, match=r"vision\.layer is -5"):
        make("clip", "llama", layer=-5)
