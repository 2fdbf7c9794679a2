"""Encoder teachers: the right tokens at the right places, whatever the family; nothing of one picture in another."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from distilvlm.models.encoders import build_encoder, frozen_copy
from distilvlm.models.forward import vision_features

from .encoder_models import CONFIGS, VITS, canvases, encoder, spec


def stock(built, pixels, **options):
    """All that the stock class gives; a built ViT is cut, so its weights go into a whole one."""
    config = AutoConfig.for_model(**CONFIGS[built.name])
    whole = AutoModel.from_config(config).eval()
    whole.load_state_dict(built.model.state_dict(), strict=False)
    with torch.no_grad():
        return whole(pixels, output_hidden_states=True, **options)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_shapes_are_known_before_a_picture_was_seen_and_without_weights(family):
    built, planned = encoder(family), build_encoder(spec(family), family, meta=True)
    seen = built.see(built.pixels(canvases()))
    assert tuple(seen.tokens.shape) == (3, built.tokens, built.channels)
    assert seen.grid == built.grid == planned.grid and built.tokens == built.grid[0] * built.grid[1]
    assert (planned.channels, planned.size) == (built.channels, built.size)
    assert planned.device.type == "meta" and planned.gives_importance == built.gives_importance


@pytest.mark.parametrize("family", list(CONFIGS))
def test_what_one_picture_gives_does_not_depend_on_its_batch_mates(family):
    built = encoder(family)
    pixels = built.pixels(canvases())
    together = built.see(pixels, importance=built.gives_importance)
    alone = built.see(pixels[1:2], importance=built.gives_importance)
    torch.testing.assert_close(together.tokens[1:2], alone.tokens, atol=1e-6, rtol=0)
    if built.gives_importance:
        torch.testing.assert_close(together.importance[1:2], alone.importance, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", VITS)
@pytest.mark.parametrize("layer", [-2, 0, 4])
def test_a_vits_tokens_are_the_patches_of_the_stock_hidden_state(family, layer):
    built = encoder(family, layer=layer)
    pixels = built.pixels(canvases())
    seen = built.see(pixels)
    expected = stock(built, pixels).hidden_states[layer]
    first = expected.shape[1] - 36
    assert torch.equal(seen.tokens, expected[:, first:])
    assert (seen.cls is None) == (first == 0)
    if first:
        assert torch.equal(seen.cls, expected[:, 0])


def test_blocks_behind_the_layer_are_not_held():
    assert len(encoder("clip", layer=2).model.encoder.layers) == 2
    assert len(encoder("siglip", layer=2).model.encoder.layers) == 4  # its pooling head stands behind all of them


@pytest.mark.parametrize(("family", "size"), [("clip", 32), ("siglip", 32), ("dinov2", 32)])
def test_another_size_gives_another_grid(family, size):
    built = encoder(family, size=size)
    seen = built.see(built.pixels(canvases()), importance=True)
    assert built.grid == (8, 8) and seen.tokens.shape[1] == seen.importance.shape[1] == 64


def test_convnexts_tokens_are_the_last_feature_map_row_by_row():
    built = encoder("convnext")
    pixels = built.pixels(canvases())
    maps = stock(built, pixels).last_hidden_state  # [3, 20, 2, 2]
    seen = built.see(pixels)
    assert seen.grid == (2, 2)
    for row in range(2):
        for column in range(2):
            torch.testing.assert_close(seen.tokens[:, 2 * row + column], maps[:, :, row, column])
    earlier = encoder("convnext", layer=2)
    assert torch.equal(earlier.see(pixels).tokens, stock(earlier, pixels).hidden_states[2].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("family", ["dinov2-registers", "convnext", "sam"])
def test_a_token_sees_the_part_of_the_picture_where_it_lies(family):
    """Only the top right corner of the picture changes; the tokens of that quarter change most."""
    built = encoder(family, **({"layer": 1} if family == "convnext" else {"layer": 0} if family != "sam" else {}))
    plain = canvases(1)
    changed = plain.clone()
    changed[..., :8, -8:] = 255 - changed[..., :8, -8:]
    before, after = (built.see(built.pixels(c)).tokens for c in (plain, changed))
    moved = (after - before).abs().sum(-1)[0].unflatten(0, built.grid)
    half = built.grid[0] // 2
    quarters = moved.unflatten(0, (2, half)).unflatten(2, (2, half)).sum((1, 3))  # [2, 2]
    assert quarters[0, 1] > 3 * (quarters.sum() - quarters[0, 1])


def test_the_canvas_of_the_encoders_size_gives_the_pixels_of_the_student_and_a_larger_one_is_resized(make):
    vlm = make("dinov2", "llama", size=12)
    anchor = frozen_copy(vlm.model.model.vision_tower, vlm.layout)
    pictures = canvases(side=12)
    # The same numbers as the student's own features, from the same canvas
    assert torch.equal(anchor.see(anchor.pixels(pictures)).tokens, vision_features(vlm.model, vlm.layout, pictures))
    flat = torch.full((1, 3, 40, 40), 77, dtype=torch.uint8)
    torch.testing.assert_close(anchor.pixels(flat), anchor.pixels(flat[..., :12, :12]))
    assert torch.equal(anchor.pixels(canvases()), anchor.pixels(canvases()))


def test_an_anchor_stays_what_the_student_was(make):
    vlm = make("clip", "llama")
    tower = vlm.model.model.vision_tower
    anchor = frozen_copy(tower, vlm.layout)
    assert tower.config.num_hidden_layers == len(tower.encoder.layers) == 3  # only the copy is cut
    pixels = anchor.pixels(canvases(side=12))
    before = anchor.see(pixels).tokens.clone()
    for parameter in tower.parameters():
        parameter.data += 1
    assert torch.equal(anchor.see(pixels).tokens, before)
    assert not any(parameter.requires_grad for parameter in anchor.model.parameters())
    assert all(parameter.requires_grad for parameter in tower.parameters())


def test_a_checkpoint_is_read_with_its_own_statistics_and_only_its_vision_half(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("clip", vision_config=CONFIGS["clip"], text_config=text | {"vocab_size": 30})
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    fields = {"from": str(tmp_path)}
    built = build_encoder(spec("clip").model_validate(fields), "clip")
    assert built.view.mean == (0.1, 0.2, 0.3) and built.view.std == (0.4, 0.5, 0.6)
    pixels = built.pixels(canvases())
    with torch.no_grad():
        expected = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(built.see(pixels).tokens, expected)
    narrow = build_encoder(spec("clip").model_validate(fields | {"precision": "bf16"}), "clip")
    assert narrow.see(narrow.pixels(canvases())).tokens.dtype == torch.bfloat16


def test_identity_names_weights_preprocessing_and_layer():
    def made(seed=1, **fields):
        return build_encoder(spec("clip", **fields), "clip", seed=seed)

    first = made()
    assert made().identity == first.identity
    assert first.made_with.keys() == {"weights", "class", "view", "layer", "importance"}
    changed = made()
    changed.model.encoder.layers[0].mlp.fc1.bias.data[0] += 1
    others = [changed, made(seed=2), made(layer=2), made(size=32), made(precision="bf16")]
    assert len({first.identity, *(other.identity for other in others)}) == 6


def test_features_do_not_depend_on_autocast_around_them():
    built = encoder("dinov2")
    pixels = built.pixels(canvases())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = built.see(pixels).tokens
    assert torch.equal(inside, built.see(pixels).tokens)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("clip", {"layer": 7}, "encoder 'clip': layer is 7, but there are hidden states 0 to 4"),
        ("convnext", {"layer": 9}, r"hidden states 0 to 4 \(or -5 to -1\), not layer 9"),
        ("sam", {"size": 32}, "64 px only, not 32"),
        ("sam", {"layer": 1}, "leave out 'layer'"),
        ("clip", {"layout": "reference"}, "SAM's alone"),
    ],
)
def test_what_an_encoder_cannot_give_is_refused_by_name(family, fields, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(spec(family, **fields), family)


def test_a_transformer_whose_tokens_shrink_is_refused():
    facts = {"model_type": "swin", "image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8}
    config = facts | {"depths": [1, 1], "num_heads": [2, 2]}
    with pytest.raises(ValueError, match="encoder 'shrinks' \\('swin'\\)"):
        build_encoder(spec("clip").model_validate({"config": config}), "shrinks")


def test_canvases_that_are_too_small_or_no_bytes_are_refused():
    built = encoder("clip")
    with pytest.raises(ValueError, match="'clip' sees pictures of 24 px, the canvas has only 16"):
        built.pixels(canvases(side=16))
    with pytest.raises(ValueError, match="not uint8"):
        built.pixels(canvases().float())


def test_importance_is_refused_where_there_is_none():
    built = encoder("convnext")
    with pytest.raises(ValueError, match="name one with it as the stage's importance source"):
        built.see(built.pixels(canvases()), importance=True)
