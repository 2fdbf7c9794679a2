"""PHI-S: equal variances by a rotation and one number, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distilvlm.losses import Moments, Standardisation
from distilvlm.losses.standardisation import equalising

EXACT = "donot_use_mm_for_euclid_dist"


def features(channels: int, count: int = 4000) -> Tensor:
    """Correlated, off centre, of very different sizes."""
    draw = torch.Generator().manual_seed(channels)
    mixing = torch.randn(channels, channels, generator=draw) * torch.logspace(-2, 1, channels)
    return torch.randn(count, channels, generator=draw) @ mixing.T + 5 * torch.randn(channels, generator=draw)


def standardised(shown: Tensor) -> tuple[Standardisation, Tensor]:
    moments = Moments()
    for piece in shown.view(4, 10, -1, shown.shape[1]):
        moments.add(piece)
    by = moments.standardisation()
    return by, by(shown)


@pytest.mark.parametrize("channels", [2, 5, 16, 48])
def test_all_channels_have_mean_0_and_variance_1(channels: int):
    _, found = standardised(features(channels))
    torch.testing.assert_close(found.mean(0), torch.zeros(channels), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.var(0, unbiased=False), torch.ones(channels), atol=2e-3, rtol=0)


@pytest.mark.parametrize("channels", [5, 48])
def test_geometry_stays_up_to_one_scale(channels: int):
    shown = features(channels)
    by, found = standardised(shown)
    torch.testing.assert_close(by.rotation @ by.rotation.T, torch.eye(channels), atol=1e-5, rtol=0)
    before, after = (torch.cdist(x[:50], x[:50], compute_mode=EXACT) for x in (shown, found))
    torch.testing.assert_close(after * by.deviation, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(by.inverse(found), shown, rtol=1e-3, atol=1e-3)


def test_variances_that_are_equal_already_stay_where_they_are():
    assert torch.equal(equalising(torch.ones(6).double()), torch.eye(6).double())


@pytest.mark.parametrize("variances", [[4.0, 0.0], [0, 0, 0, 1], [9, 1, 1, 1, 1], [3, 2, 1], [1e-6, 1, 1e6]])
def test_plane_rotations_meet_the_mean_whatever_the_variances(variances: list[float]):
    spread = torch.tensor(variances).double()
    rotation = equalising(spread)
    found = (rotation @ torch.diag(spread) @ rotation.T).diagonal()
    torch.testing.assert_close(found, spread.mean().expand_as(found), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(spread)).double(), atol=1e-12, rtol=0)


def test_features_that_never_change_are_refused():
    moments = Moments()
    with pytest.raises(ValueError, match="no features"):
        moments.standardisation()
    moments.add(torch.ones(5, 3))
    with pytest.raises(ValueError, match="never change"):
        moments.standardisation()
