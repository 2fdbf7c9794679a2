"""Pictures alone: every different picture once, whatever shows it; and what encoders need beside the student."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from distilvlm.cli import app
from distilvlm.data import DataError, StageData
from distilvlm.data.collate import collate
from distilvlm.data.geometry import canvas, decode
from distilvlm.data.pictures import read_pictures
from distilvlm.recipe import Augmentation, PictureSpec, SourceSpec
from tests.runs.tiny_move import write_alone


@pytest.fixture
def place(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name in ("a.png", "b.png", "deeper/c.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path


def stage_data(source: SourceSpec, **changes: object) -> StageData:
    settings = {"placeholders": 4, "visual": [True] * 4, "pictures": PictureSpec(), "size": 16, "max_length": 64}
    return StageData([read_pictures(source, "p")], None, **(settings | {"seed": 1} | changes))  # type: ignore[arg-type]


def test_a_directory_is_read_in_order_with_all_that_lies_below(place: Path) -> None:
    source = read_pictures(SourceSpec(path=str(place / "pictures")), "p")
    assert [record.id for record in source.records] == ["a.png", "b.png", "deeper/c.png"]
    assert all(len(record.images) == 1 and not record.turns for record in source.records)
    assert len(read_pictures(SourceSpec(path=str(place / "pictures"), take=2), "p").records) == 2
    with pytest.raises(DataError, match=r"has 3 pictures, but data\.p\.rows says 4"):
        read_pictures(SourceSpec(path=str(place / "pictures"), rows=4), "p")
    (place / "empty").mkdir()
    with pytest.raises(DataError, match="has no picture"):
        read_pictures(SourceSpec(path=str(place / "empty")), "p")


def test_rows_show_each_picture_once_and_text_only_rows_none(place: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "this"}]
    two = [{"from": "human", "value": "<image><image>\nwhat"}, {"from": "gpt", "value": "these"}]
    text = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "nothing"}]
    rows = [
        {"id": 0, "image": "a.png", "conversations": talk},
        {"id": 1, "conversations": text},
        {"id": 2, "image": ["a.png", "b.png"], "conversations": two},
    ]
    (place / "rows.json").write_text(json.dumps(rows))
    source = read_pictures(SourceSpec(path=str(place / "rows.json"), images=str(place / "pictures")), "p")
    assert [(record.key.row, Path(record.images[0]).name) for record in source.records] == [(0, "a.png"), (2, "b.png")]


def test_a_batch_has_pictures_and_owners_and_no_text(place: Path) -> None:
    data = stage_data(SourceSpec(path=str(place / "pictures")), encoder_size=24)
    report = data.check()
    assert (report.samples, report.learned, report.bad) == (3, 0, [])
    batch = collate([data[0, index] for index in range(3)])
    assert batch.owners is not None and batch.owners.tolist() == [0, 1, 2]
    assert batch.input_ids.shape == (3, 1) and not batch.response_rows.numel() and not batch.placeholder_rows.numel()
    assert batch.pictures is not None and batch.canvases is not None
    assert batch.pictures.shape == (3, 3, 16, 16) and batch.canvases.shape == (3, 3, 24, 24)
    image = decode(str(place / "pictures" / "a.png"))
    assert torch.equal(batch.pictures[0], canvas(image, "square", 16))
    assert torch.equal(batch.canvases[0], canvas(image, "square", 24))


def test_both_canvases_are_of_one_augmented_picture(place: Path) -> None:
    """The same crop and flip: what encoders see lies where the student sees it."""
    pictures = PictureSpec(augment=Augmentation(flip=1.0, crop=0.5))
    data = stage_data(SourceSpec(path=str(place / "pictures")), encoder_size=40, size=40, pictures=pictures)
    sample = data[3, 1]
    assert sample.pictures is not None and sample.canvases is not None
    assert torch.equal(sample.pictures, sample.canvases)
    whole = canvas(decode(str(place / "pictures" / "b.png")), "square", 40)
    assert not torch.equal(sample.pictures[0], whole)


def test_what_encoders_saw_travels_with_its_pictures(place: Path) -> None:
    seen = lambda path: {"cnn/tokens": torch.full((2, 3), float(len(Path(path).name)))}  # noqa: E731
    data = stage_data(SourceSpec(path=str(place / "pictures")), seen_reader=seen)
    batch = collate([data[0, 0], data[0, 2]]).to("cpu")
    assert batch.canvases is None and batch.seen is not None
    assert batch.seen["cnn/tokens"].shape == (2, 2, 3) and bool((batch.seen["cnn/tokens"] == 5).all())
    with pytest.raises(ValueError, match="augment"):
        stage_data(
            SourceSpec(path=str(place / "pictures")),
            seen_reader=seen,
            pictures=PictureSpec(augment=Augmentation(flip=0.5)),
        )


def test_a_broken_picture_is_named_or_counts_as_nothing(place: Path) -> None:
    (place / "pictures" / "b.png").write_bytes((place / "pictures" / "b.png").read_bytes()[:60])
    spec = SourceSpec(path=str(place / "pictures"))
    with pytest.raises(DataError, match=r"b\.png"):
        stage_data(spec)[0, 1]
    sample = stage_data(spec, on_bad_row="quarantine")[0, 1]
    assert sample.weight == 0 and sample.pictures is None and "b.png" in str(sample.bad[0])


def test_the_check_of_a_recipe_looks_at_pictures_where_its_stages_do(tmp_path: Path) -> None:
    recipe = write_alone(tmp_path)
    done = CliRunner().invoke(app, ["data", "check", str(recipe)])
    assert done.exit_code == 0 and "0 of 10 rows can't be used" in done.output, done.output
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    done = CliRunner().invoke(app, ["data", "check", str(recipe)])
    assert done.exit_code == 1 and "3.png" in done.output
