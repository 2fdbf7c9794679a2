"""From files to micro-batches: what is in them, who decodes what, and what happens to rows that turn out bad."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distilvlm.data import (
    IGNORED,
    Batch,
    DataError,
    DataReport,
    Grouping,
    Order,
    StageData,
    batches,
    geometry,
    raise_or_quarantine,
    read,
)
from distilvlm.data.collate import collate
from distilvlm.recipe.schema import Augmentation, PictureSpec, SourceSpec

from .small_data import CHATML, llava_row, make_pictures, make_tokenizer, mixed_rows, write_json

PLACEHOLDERS, SIZE = 5, 8
VISUAL = [False, True, True, True, True]  # the first is a register


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    return make_pictures(tmp_path / "images", 4)


@pytest.fixture
def decodes(monkeypatch) -> list[str]:
    """Paths in the order they were decoded in this process."""
    seen: list[str] = []
    decode = geometry.decode
    monkeypatch.setattr(geometry, "decode", lambda path: seen.append(path) or decode(path))
    return seen


def stage_data(tmp_path: Path, rows: list[dict], **changes) -> StageData:
    path = write_json(tmp_path / "data.json", rows)
    source = read(SourceSpec(path=str(path), images=str(tmp_path / "images")), "talk")
    settings = {
        "placeholders": PLACEHOLDERS,
        "visual": VISUAL,
        "pictures": PictureSpec(),
        "size": SIZE,
        "max_length": 256,
        "seed": 11,
        **changes,
    }
    return StageData([source], make_tokenizer(CHATML), **settings)


def same(one: Batch, other: Batch) -> bool:
    for name in (field.name for field in fields(Batch)):
        left, right = getattr(one, name), getattr(other, name)
        if not (left.equal(right) if isinstance(left, Tensor) and isinstance(right, Tensor) else left == right):
            return False
    return True


def test_a_mixed_batch_names_its_rows(tmp_path, images):
    rows = [
        llava_row(0, images[0], "<image>\nq", "red"),
        llava_row(1, None, "is it?", "it is"),
        {**llava_row(2, None, "<image> or <image>?", "blue"), "image": images[1:3]},
    ]
    data = stage_data(tmp_path, rows)
    samples = [data[0, index] for index in range(3)]
    batch = collate(samples)
    length = batch.length
    assert batch.samples == 3 and length == max(len(sample.input_ids) for sample in samples)
    assert batch.attention_mask.sum(1).tolist() == [len(sample.input_ids) for sample in samples]
    # 1 + 0 + 2 pictures, of 5 placeholders each; the register is a placeholder but no visual row.
    assert batch.placeholder_rows.numel() == 15 and batch.visual_rows.numel() == 12
    assert batch.pictures is not None and batch.pictures.shape == (3, 3, SIZE, SIZE)
    assert (batch.placeholder_rows // length).tolist() == [0] * 5 + [2] * 10
    registers = sorted(set(batch.placeholder_rows.tolist()) - set(batch.visual_rows.tolist()))
    assert registers == batch.placeholder_rows[[0, 5, 10]].tolist()
    # Response rows are shifted once: the token behind each is the target, and together they are the answers.
    flat = batch.input_ids.flatten()
    assert flat[batch.response_rows + 1].equal(batch.response_targets)
    tokenizer = data.templates["chat"].tokenizer
    assert tokenizer.decode(batch.response_targets.tolist()) == "red<|im_end|>it is<|im_end|>blue<|im_end|>"
    expected = geometry.canvas(geometry.decode(str(tmp_path / "images" / images[2])), "square", SIZE)
    assert batch.pictures[2].equal(expected)
    assert batch.weights.tolist() == [1, 1, 1] and [key.row for key in batch.keys] == [0, 1, 2]


def test_text_only_batches_have_no_pictures(tmp_path, images):
    batch = collate([stage_data(tmp_path, [llava_row(0, None, "q", "a")])[0, 0]])
    assert batch.pictures is None and not batch.has_pictures and batch.visual_rows.numel() == 0


def test_rows_whose_placeholders_belong_to_another_are_refused(tmp_path, images):
    data = stage_data(tmp_path, [llava_row(n, images[n], "<image>\nq", "red") for n in range(2)])
    one, other = data[0, 0], data[0, 1]
    fewer = replace(one, placeholder_positions=one.placeholder_positions[:-1])
    more = replace(other, placeholder_positions=torch.cat([other.placeholder_positions, torch.tensor([0])]))
    with pytest.raises(ValueError, match=r"row 0: 4 placeholders for 1 pictures of 5"):
        collate([fewer, more])


def test_augmentation_depends_on_seed_epoch_and_index_only(tmp_path, images):
    spec = PictureSpec(augment=Augmentation(flip=0.5, crop=0.3, brightness=0.3))
    rows = [llava_row(n, images[0], "<image>\nq", "red") for n in range(3)]
    data = stage_data(tmp_path, rows, pictures=spec)
    first = data[0, 1].pictures
    assert first is not None
    for other in ((2, 0), (0, 0), (1, 1)):
        assert not data[other].pictures.equal(first)
    random.random(), np.random.random(), torch.rand(1)
    assert data[0, 1].pictures.equal(first)
    assert not stage_data(tmp_path, rows, pictures=spec, seed=12)[0, 1].pictures.equal(first)


def test_kept_features_stand_in_for_pixels(tmp_path, images, decodes):
    def reader(path: str) -> Tensor:
        return torch.full((PLACEHOLDERS, 2), float(Path(path).stem))

    rows = [llava_row(n, images[n], "<image>\nq", "red") for n in range(2)]
    data = stage_data(tmp_path, rows, feature_reader=reader)
    batch = collate([data[0, 1], data[0, 0]])
    assert batch.pictures is None and decodes == []
    assert batch.features is not None and batch.features[:, 0, 0].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"augment.*features"):
        stage_data(tmp_path, rows, feature_reader=reader, pictures=PictureSpec(augment=Augmentation(flip=1)))
    with pytest.raises(DataError, match=r"row 0.*\[3, 2\], not \[5, d_vision\]"):
        stage_data(tmp_path, rows, feature_reader=lambda path: torch.zeros(3, 2))[0, 0]


def test_check_finds_without_decoding(tmp_path, images, decodes):
    (tmp_path / "images" / "text.png").write_text("hello")
    rows = [
        llava_row(0, images[0], "<image>\nq", "red"),
        llava_row(1, "text.png", "<image>\nq", "red"),
        {**llava_row(2, None, "<image>" * 10 + "q", "red"), "image": [images[0]] * 10},
        llava_row(3, None, "what " * 60, "red"),
        llava_row(4, "gone.png", "<image>\nq", "red"),
        llava_row(5, None, "q", "red " * 60),
    ]
    data = stage_data(tmp_path, rows, max_length=40)
    report = data.check()
    assert decodes == []
    assert sorted((row.key.row, row.field) for row in report.bad) == [
        (1, "image"),
        (2, "image"),
        (3, "conversation"),
        (4, "image"),
    ]
    assert (report.samples, report.with_pictures, report.text_only, report.cut) == (2, 1, 1, 1)
    assert report.longest == 40
    kept = data.without(report.bad)
    assert [kept.record(index).key.row for index in range(len(kept))] == [0, 5]
    assert kept.picture_counts.tolist() == [1, 0] and kept.lengths.tolist() == [2 + 1 + PLACEHOLDERS, 61]
    assert len(data) == 5 and len(raise_or_quarantine(report.bad, "quarantine")) == 4
    with pytest.raises(DataError, match="no usable row in 'talk'"):
        kept.without(kept.check().bad + [replace(report.bad[0], key=kept.record(n).key) for n in range(2)])


def test_a_report_tells_its_sources_apart_and_survives_json(tmp_path, images):
    rows = {
        "shown": [llava_row(n, images[n % 4], "<image>\nq", "red") for n in range(6)],
        "told": [llava_row(n, None, "what <image> is it?", "it is " * n) for n in range(8)],  # the first has no answer
    }
    sources = []
    for (name, own), weight in zip(rows.items(), (0.5, 2.0), strict=True):
        path = write_json(tmp_path / f"{name}.json", own)
        sources.append(read(SourceSpec(path=str(path), images=str(tmp_path / "images"), weight=weight), name))
    settings = {"placeholders": PLACEHOLDERS, "visual": VISUAL, "pictures": PictureSpec(), "size": SIZE, "seed": 11}
    data = StageData(sources, make_tokenizer(CHATML), max_length=64, **settings)
    report = data.check()
    shown, told = report.sources["shown"], report.sources["told"]
    assert (shown.samples, shown.with_pictures, shown.pictures, shown.bad, shown.neutralised) == (6, 6, 6, 0, 0)
    assert (told.samples, told.text_only, told.pictures, told.bad, told.neutralised) == (7, 7, 0, 1, 7)
    lengths = sorted(len(data.encoded(index).input_ids) for index in range(6, 13))
    assert (told.median, told.ninety_ninth, told.longest) == (lengths[3], lengths[-1], lengths[-1])
    assert (report.samples, report.tokens, report.longest) == (13, shown.tokens + sum(lengths), max(lengths))
    assert (shown.showings, told.showings, report.share("told")) == (3, 14, 14 / 17)
    assert "an epoch is 18% shown, 82% told" in str(report)
    assert DataReport.restored(json.loads(json.dumps(report.as_json()))) == report


def test_weighted_rows_are_drawn_anew_each_time_an_epoch_shows_them(tmp_path, images):
    path = write_json(tmp_path / "data.json", [llava_row(0, images[3], "<image>\nq", "red")])
    source = read(SourceSpec(path=str(path), images=str(tmp_path / "images"), weight=3.0), "talk")
    spec = PictureSpec(augment=Augmentation(crop=0.3, brightness=0.5))
    settings = {"placeholders": PLACEHOLDERS, "visual": VISUAL, "pictures": spec, "size": SIZE, "max_length": 256}
    data = StageData([source], make_tokenizer(CHATML), seed=11, **settings)
    order = Order(len(data), 4, 5, "dpt", mixture=data.mixture)
    seen = [data[at].pictures for at in (*order.update(0), *order.update(1))]
    assert len(seen) == 6
    assert all(not one.equal(other) for one, other in itertools.combinations(seen, 2))


def test_a_picture_that_breaks_later_stops_or_stands_in(tmp_path, images):
    rows = [llava_row(n, images[n], "<image>\nq", "red") for n in range(2)]
    whole = (tmp_path / "images" / images[1]).read_bytes()
    (tmp_path / "images" / images[1]).write_bytes(whole[:600])
    with pytest.raises(DataError, match=r"data 'talk'.*row 1, field 'image'.*1\.png can't be read"):
        stage_data(tmp_path, rows)[0, 1]
    data = stage_data(tmp_path, rows, on_bad_row="quarantine")
    assert data.check().bad == []  # its header is whole
    batch = collate([data[0, 0], data[0, 1]])
    assert batch.weights.tolist() == [1.0, 0.0]
    assert [(row.key.row, row.field) for row in batch.bad] == [(1, "image")]
    assert batch.pictures is not None and len(batch.pictures) == 1
    assert (batch.response_rows < batch.length).all()  # nothing is learned from the stand-in
    assert (collate([data[0, 1]]).response_rows).numel() == 0


def test_a_sample_at_which_anything_else_breaks_is_named(tmp_path, images, monkeypatch):
    def full(path: str) -> None:
        raise RuntimeError("no room")

    data = stage_data(tmp_path, [llava_row(n, images[n], "<image>\nq", "red") for n in range(2)])
    monkeypatch.setattr(geometry, "decode", full)
    with pytest.raises(
        DataError, match=r"'talk', .*data\.json, row 1 \(pass 0\) could not be loaded: RuntimeError: no r"
    ):
        data[0, 1]


def test_lengths_are_recalled_into_the_same_sources_only(tmp_path, images):
    data = stage_data(tmp_path, mixed_rows(images, 3))
    with pytest.raises(ValueError, match="kept lengths are of other sources"):
        data.recall_lengths({"other": data.known_lengths["talk"]})


def collected(data: StageData, order: Order, first: int, last: int, **settings) -> list[tuple[int, list[Batch]]]:
    made = batches(data, order, first, last, **settings)
    return [(update, list(micro_batches)) for update, micro_batches in made]


def make_order(data: StageData, batch: int = 4, order: str = "random") -> Order:
    return Order(len(data), batch, 5, "dpt", order, data.lengths, data.picture_counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_draws_from_no_global_generator(tmp_path, images, workers):
    data = stage_data(tmp_path, mixed_rows(images, 6), pictures=PictureSpec(augment=Augmentation(flip=0.5)))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    collected(data, make_order(data), 0, 3, grouping=Grouping(2), workers=workers)
    assert before[0].equal(torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_two_workers_give_the_same_batches_as_none(tmp_path, images):
    spec = PictureSpec(augment=Augmentation(flip=0.5, crop=0.5))
    data = stage_data(tmp_path, mixed_rows(images, 10), pictures=spec)
    settings = {"first": 1, "last": 7, "grouping": Grouping(2), "rank": 1, "world": 2}
    alone = collected(data, make_order(data), **settings)
    helped = collected(data, make_order(data), **settings, workers=2)
    assert [update for update, _ in alone] == [update for update, _ in helped] == list(range(1, 7))
    for (_, left), (_, right) in zip(alone, helped, strict=True):
        assert len(left) == len(right) and all(itertools.starmap(same, zip(left, right, strict=True)))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["random", "grouped"])
def test_any_number_of_ranks_sees_each_sample_once_an_epoch(tmp_path, images, world, kind):
    data = stage_data(tmp_path, mixed_rows(images, 11))
    order = make_order(data, batch=4, order=kind)
    seen = [
        key.row
        for rank in range(world)
        for _, made in collected(data, order, 3, 6, rank=rank, world=world, grouping=Grouping(2))
        for batch in made
        for key in batch.keys
    ]
    assert sorted(seen) == list(range(11))


def test_a_rank_without_samples_gets_an_empty_list(tmp_path, images):
    data = stage_data(tmp_path, mixed_rows(images, 5))
    for workers in (0, 2):
        made = collected(data, make_order(data), 0, 2, rank=1, world=2, workers=workers)
        assert [[batch.samples for batch in micro] for _, micro in made] == [[1, 1], []]


def test_continuing_at_update_1000_decodes_nothing_of_the_first_1000(tmp_path, images, decodes):
    rows = [llava_row(n, images[n % 4], "<image>\nq", "red") for n in range(8)]
    data = stage_data(tmp_path, rows)
    order = make_order(data, batch=2)
    whole = [[str(path) for path in data.record(index).images] for _, index in order.update(1000)]
    ((update, _),) = collected(data, order, 1000, 1001)
    assert update == 1000 and decodes == list(itertools.chain(*whole))


def test_an_update_begins_before_its_last_picture_is_decoded(tmp_path, images, decodes):
    rows = [llava_row(n, images[n % 4], "<image>\nq", "red") for n in range(8)]
    data = stage_data(tmp_path, rows)
    made = batches(data, make_order(data, batch=8), 0, 2, grouping=Grouping(2))
    _, first = next(made)
    assert len(first) == 4 and not decodes
    next(iter(first))
    assert len(decodes) == 2
    _, second = next(made)  # what is left of the first is passed over
    assert sum(batch.samples for batch in second) == 8


def test_workers_keep_step_where_an_update_is_left_early(tmp_path, images):
    data = stage_data(tmp_path, mixed_rows(images, 8))
    settings = {"grouping": Grouping(tokens=128, packed=True)}
    expected = collected(data, make_order(data), 0, 3, **settings)
    for (update, whole), (number, part) in zip(
        expected, batches(data, make_order(data), 0, 3, workers=2, **settings), strict=True
    ):
        assert update == number and len(whole) == len(part) and same(next(iter(part)), whole[0])


def test_an_error_in_a_worker_names_the_sample(tmp_path, images):
    rows = [llava_row(n, images[n], "<image>\nq", "red") for n in range(3)]
    (tmp_path / "images" / images[2]).write_text("no picture any more")
    data = stage_data(tmp_path, rows)
    with pytest.raises(DataError, match=r"row 2, field 'image'"):
        collected(data, make_order(data), 0, 1, workers=1)


def test_stage_data_travels_to_another_process(tmp_path, images):
    data = stage_data(tmp_path, mixed_rows(images, 6))
    copied = pickle.loads(pickle.dumps(data))
    assert all(same(collate([data[1, index]]), collate([copied[1, index]])) for index in range(6))


def test_labels_stay_ignored_where_nothing_is_learned(tmp_path, images):
    data = stage_data(tmp_path, mixed_rows(images, 3))
    sample = data[0, 0]
    assert (sample.labels[sample.placeholder_positions] == IGNORED).all()
    assert (sample.input_ids[sample.placeholder_positions] == 0).all()
