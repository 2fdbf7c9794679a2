"""SAM: tokens at their places by default, the reference's scrambled ones by a switch."""

import pytest
import torch

from distilvlm.models.encoders import reference_layout

from .encoder_models import canvases, encoder


def test_tokens_are_the_necks_places_row_by_row():
    built = encoder("sam")
    pixels = built.pixels(canvases())
    with torch.no_grad():
        neck = built.model(pixels).last_hidden_state  # [3, 16, 4, 4], channels first
    tokens = built.see(pixels).tokens
    for row in range(4):
        for column in range(4):
            assert torch.equal(tokens[:, 4 * row + column], neck[:, :, row, column])


@pytest.mark.parametrize(("channels", "side"), [(16, 4), (256, 64)])
def test_the_references_layout_follows_its_index_formula(channels, side):
    maps = torch.arange(channels * side * side, dtype=torch.float32).reshape(1, channels, side, side)
    out = reference_layout(maps)
    assert out.shape == maps.shape
    c, h, w = torch.meshgrid(torch.arange(channels), torch.arange(side), torch.arange(side), indexing="ij")
    moved = out[0, 4 * w + 2 * ((c // 2) % 2) + h % 2, c // 4, (c % 2) * (side // 2) + h // 2]
    assert torch.equal(moved, maps[0])


def test_the_switch_reorders_the_same_numbers():
    straight, scrambled = encoder("sam"), encoder("sam", layout="reference")
    pixels = straight.pixels(canvases())
    one, other = straight.see(pixels).tokens, scrambled.see(pixels).tokens
    assert one.shape == other.shape and not torch.equal(one, other)
    assert torch.equal(one.flatten(1).sort(1).values, other.flatten(1).sort(1).values)
    assert straight.identity != scrambled.identity


def test_sizes_that_the_reference_has_no_layout_for_are_refused():
    with pytest.raises(ValueError, match="not for 8 × 4 × 4: use layout 'true'"):
        reference_layout(torch.zeros(1, 8, 4, 4))
