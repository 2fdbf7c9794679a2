"""The meter sees a known allocation, and only what lies between start and stop."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from distilvlm.cost import Meter, meter

MIB = 2**20
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


@pytest.mark.parametrize("kept_by_the_kernel", [True, False])
def test_a_known_allocation_is_seen(kept_by_the_kernel: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not kept_by_the_kernel:
        monkeypatch.setattr(meter, "CLEAR", tmp_path / "no" / "such" / "file")
    torch.ones(60 * MIB // 4)  # gone before the start
    watch = Meter()
    watch.start()
    before = meter.resident_bytes()
    block = torch.ones(30 * MIB // 4)
    if not kept_by_the_kernel:
        time.sleep(0.05)  # the thread looks every few milliseconds
    del block
    watch.stop()
    torch.ones(90 * MIB // 4)  # after the stop
    peak = watch.measured().peak_memory_bytes
    assert peak is not None
    assert 28 * MIB < peak - before < 45 * MIB


def test_seconds_are_the_median_without_the_first(tmp_path: Path) -> None:
    with Meter(directory=tmp_path) as watch:
        for seconds in (9.0, 1.0, 3.0, 2.0):
            watch.update(seconds)
        (tmp_path / "below").mkdir()
        (tmp_path / "below" / "file").write_bytes(bytes(1234))
    found = watch.measured()
    assert (found.seconds_per_update, found.disk_bytes) == (2.0, 1234)


def test_one_update_tells_no_time() -> None:
    with Meter() as watch:
        watch.update(1.0)
    assert watch.measured().seconds_per_update is None
    assert watch.measured().disk_bytes is None
