"""Every golden case against our code. Its arrays say of what kind a case is, its name whether we depart from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import golden_llava_kd
from tests.golden_cases import GoldenCase

KINDS = [golden_llava_kd.check]


def compare(case: GoldenCase) -> None:
    if not any(check(case) for check in KINDS):
        pytest.fail(f"{case.file}: no code compares case {case.name!r} with arrays {', '.join(case.arrays)}")


@pytest.mark.golden
def test_agrees_with_the_reference(golden_case: GoldenCase):
    compare(golden_case)


def test_an_altered_array_is_noticed(shipped_case: GoldenCase):
    """The comparison can fail: every floating-point output that is held against the reference is."""
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
