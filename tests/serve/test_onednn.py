"""Another kernel for linear layers gives the same products, and is gone when it is not wanted any more."""

from __future__ import annotations

import pytest
import torch

from distilvlm.models.onednn import faster_linear

from . import small_models as tiny


@torch.inference_mode()
def test_products_are_the_same_whatever_the_kernel() -> None:
    vlm = tiny.vlm(adaptors=True)
    head, gate = vlm.model.lm_head, vlm.model.model.language_model.layers[0].mlp.gate_proj
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 1, 32), (5, 1, 32), (3, 40, 32), (7, 32), (0, 32)]
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    given.append(torch.randn(6, 9, 32, generator=generator)[:, -1])  # rows that lie apart
    wanted = [(head(each), gate(each)) for each in given]
    with faster_linear(vlm) as chosen:
        assert chosen > 30  # of towers, decoder and adaptors
        for each, (first, second) in zip(given, wanted, strict=True):
            torch.testing.assert_close(head(each), first, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(gate(each), second, atol=1e-5, rtol=1e-5)
    assert all("forward" not in vars(module) for tree in vlm.trees for module in tree.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_their_kernel(dtype: torch.dtype) -> None:
    vlm = tiny.vlm()
    vlm.model.to(dtype)
    with faster_linear(vlm) as chosen:
        assert chosen == 0


@torch.inference_mode()
def test_autocast_still_multiplies_in_bf16() -> None:
    vlm = tiny.vlm()
    given = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = vlm.model.lm_head(given)
        with faster_linear(vlm):
            assert torch.equal(vlm.model.lm_head(given), wanted)


def test_within_itself_it_changes_nothing_twice() -> None:
    vlm = tiny.vlm()
    with faster_linear(vlm) as outer:
        with faster_linear(vlm) as inner:
            assert inner == 0
        assert sum("forward" in vars(module) for tree in vlm.trees for module in tree.modules()) == outer
