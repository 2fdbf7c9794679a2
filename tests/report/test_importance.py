"""Where an encoder looks, as the page shows it."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distilvlm.report.formats import ImportanceFile
from distilvlm.report.importance import heat_over, importance
from distilvlm.report.page import render
from distilvlm.report.pictures import Album
from distilvlm.report.read import ReportError, read

GRID = [0.02] * 24 + [0.52]


def content(*pictures: Path, weights: list[float] = GRID) -> dict[str, object]:
    looked = [{"picture": str(path), "weights": weights} for path in pictures]
    used = ["stage 1: as the paper has it"]
    return {"maps": [{"encoder": "anchor", "grid": [5, 5], "geometry": "square", "used_by": used, "pictures": looked}]}


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    for number in range(2):
        Image.new("RGB", (120, 160), (40 * number, 90, 120)).save(tmp_path / f"{number}.jpg")
    return [tmp_path / f"{number}.jpg" for number in range(2)]


def test_heat_is_where_the_weight_is() -> None:
    shares = np.zeros((4, 4), dtype=np.float32)
    shares[0, 3] = 1
    drawn = np.asarray(heat_over(np.full((80, 80, 3), 100, dtype=np.uint8), shares)).sum(axis=2)
    hottest = np.unravel_index(drawn.argmax(), drawn.shape)
    assert hottest[0] < 20 and hottest[1] >= 60
    assert drawn[60, 20] == drawn[70, 10] < drawn[5, 75] / 4  # cold: dark, whatever the place


def test_lightness_only_rises_with_weight() -> None:
    ramp = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None], 64, axis=0)
    drawn = np.asarray(heat_over(np.zeros((64, 64, 3), dtype=np.uint8), ramp).convert("L"), dtype=int)
    assert (np.diff(drawn[32]) >= 0).all() and drawn[32, -1] > drawn[32, 0] + 100


def test_one_scale_for_all_so_that_an_even_map_looks_even(pictures: list[Path]) -> None:
    file = content(*pictures)
    file["maps"][0]["pictures"][1]["weights"] = [0.04] * 25
    (found,) = importance(ImportanceFile.model_validate(file), Album())
    assert found.few == 2
    assert [one.concentrated for one in found.pictures] == pytest.approx([0.54, 0.08])
    pointed, even = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(one.heat.uri.split(",")[1])))) for one in found.pictures
    )
    assert pointed[-1, -1].sum() > 2 * even[-1, -1].sum()  # its heaviest patch
    assert np.ptp(even.sum(axis=2).astype(int)) < 20  # of one colour, as its picture is


def test_a_run_shows_where_its_encoder_looks(finished: Path, pictures: list[Path], tmp_path: Path) -> None:
    (finished / "importance.json").write_text(json.dumps(content(*pictures, tmp_path / "gone.jpg")))
    try:
        page = render(read(finished))
    finally:
        (finished / "importance.json").unlink()
    assert page.count("map of attention over") == 2 and 'href="#importance"' in page
    assert "4 times an even share, or more" in page and "The 2 heaviest of 25 patches have 54%." in page
    assert "stage 1: as the paper has it" in page and page.count("gone.jpg: no such file") == 2
    assert "#importance" not in render(read(finished))


def test_a_map_that_does_not_fit_its_grid_is_named(finished: Path, pictures: list[Path]) -> None:
    (finished / "importance.json").write_text(json.dumps(content(pictures[0], weights=[0.5, 0.5])))
    try:
        with pytest.raises(ReportError, match=r"importance.json: .*2 weights on a grid of 5 by 5"):
            read(finished)
    finally:
        (finished / "importance.json").unlink()
