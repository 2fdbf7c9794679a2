"""Every golden case against our code. Its arrays say of what kind a case is, its name whether we depart from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import golden_iaa, golden_llava_kd, golden_llava_mod, golden_move_kd
from tests.golden_cases import GoldenCase

KINDS = [golden_llava_kd.check, golden_llava_mod.check, golden_iaa.check, golden_move_kd.check]


def compare(case: GoldenCase) -> None:
    if not any(check(case) for check in KINDS):
        pytest.fail(f"{case.file}: no code compares case {case.name!r} with arrays {', '.join(case.arrays)}")


@pytest.mark.golden
def test_agrees_with_the_reference(golden_case: GoldenCase):
    compare(golden_case)


def test_an_altered_array_is_noticed(shipped_case: GoldenCase):
    """The comparison can fail: every floating-point output that is held against the reference is."""
    if any(other.check(shipped_case) for other in (golden_llava_mod, golden_iaa, golden_move_kd)):
        return  # below, and in test_golden_iaa.py and test_golden_move_kd.py
    departure = golden_llava_kd.DEPARTURES.get(shipped_case.name)
    waived = {*(departure.arrays if departure else ()), *golden_llava_kd.UNKNOWN_DIVERGENCES}
    for name, array in shipped_case.arrays.items():
        if name in waived or not array.is_floating_point() or array.numel() > 2000:
            continue
        altered = array.clone()
        altered.view(-1)[:1] += 1e-3 * max(1.0, float(array.abs().max())) if array.dim() else 1e-3
        if not torch.isfinite(altered).all():
            continue
        with pytest.raises(AssertionError):
            compare(replace(shipped_case, arrays={**shipped_case.arrays, name: altered}))


WAIVED = {
    # LLaVA-MoD's arrays that may change unnoticed in the shipped file, and why.
    ("layer", "mixed.eval.gumbel.out"): "departs: it is compared with our rule",
    ("layer", "x_skewed"): "an input of which the file has no outputs: it is compared with our rule",
    ("residual", "coef_weight"): "departs: there is no residual branch",
    ("residual", "coef_bias"): "departs: there is no residual branch",
}


def test_every_altered_array_of_llava_mod_is_noticed(shipped_case: GoldenCase):
    """An output in its first and in its last entry, an input as a whole."""
    if (reading := golden_llava_mod.read(shipped_case)) is None:
        return
    assert reading.given | reading.compared | reading.departed == set(shipped_case.arrays)
    for name, array in shipped_case.arrays.items():
        if (shipped_case.name, name) in WAIVED:
            continue
        for altered in _altered_entries(array) if name in reading.compared else _altered_whole(array):
            with pytest.raises(AssertionError):
                compare(replace(shipped_case, arrays={**shipped_case.arrays, name: altered}))
                pytest.fail(f"{shipped_case.name}.{name} may change unnoticed")


def _altered_entries(array: Tensor) -> Iterator[Tensor]:
    for place in (0, -1):
        altered = array.clone().view(-1)
        if array.is_floating_point():
            altered[place] += 1e-3 * max(1.0, float(array.abs().max()))
        else:
            altered[place] = altered[place] + 1 if array.dtype != torch.bool else ~altered[place]
        yield altered.view_as(array)


def _altered_whole(array: Tensor) -> Iterator[Tensor]:
    if array.is_floating_point():
        yield array.flatten().roll(1).view_as(array) * 1.01
