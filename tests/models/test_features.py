"""Kept features: the tower's own, the same bits whatever kills the filling, and refused for another tower."""

import itertools
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from distilvlm import storage
from distilvlm.models.features import FeatureError, FeatureStore
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.forward import vision_features
from distilvlm.models.vlm import VLM, VisionLayout

LAYOUT = VisionLayout(
    size=8,
    patch=4,
    placeholders=4,
    visual=(True,) * 4,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
    select="default",
    layer=-1,
)


def make_vlm(seed: int = 0) -> VLM:
    torch.manual_seed(seed)
    vision = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=8)
    text = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=5, head_dim=4
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-1)
    ).eval()
    return VLM(model.requires_grad_(False), None, LAYOUT, 5)


@pytest.fixture(scope="module")
def vlm():
    return make_vlm()


def canvas(path: str) -> Tensor:
    """A picture file here holds the seed of its pixels."""
    generator = torch.Generator().manual_seed(int(Path(path).read_text()))
    return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator)


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    paths = [tmp_path / "pictures" / f"{seed}.png" for seed in range(7)]
    for seed, path in enumerate(paths):
        path.write_text(str(seed))
    return [str(path) for path in paths]


def make_store(directory, vlm, **changes) -> FeatureStore:
    tower = fingerprint(vlm.model.model.vision_tower)
    return FeatureStore(directory, **{"layout": vlm.layout, "tower": tower, "geometry": "square", "shard": 3} | changes)


def shards(directory) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((directory / "shards").iterdir())}


def test_what_is_read_is_what_the_tower_computes(tmp_path, vlm, pictures):
    store = make_store(tmp_path / "store", vlm)
    assert store.fill(pictures, vlm, canvas, batch=2) == {}
    reader = store.reader()
    for path in pictures:
        expected = vision_features(vlm.model, LAYOUT, canvas(path)[None])[0]
        torch.testing.assert_close(reader(path), expected, atol=1e-6, rtol=1e-5)


def test_bf16_is_kept_as_the_rounding_of_fp32(tmp_path, vlm, pictures):
    exact, rounded = make_store(tmp_path / "a", vlm), make_store(tmp_path / "b", vlm, dtype=torch.bfloat16)
    for store in (exact, rounded):
        store.fill(pictures, vlm, canvas)
    for path in pictures:
        assert torch.equal(rounded.reader()(path), exact.reader()(path).bfloat16())


def test_a_picture_is_computed_once_however_often_and_under_whatever_name_it_comes(tmp_path, vlm, pictures):
    calls = []
    twin = tmp_path / "twin.png"
    twin.write_text("3")
    store = make_store(tmp_path / "store", vlm)
    counted = lambda path: calls.append(path) or canvas(path)  # noqa: E731
    store.fill([*pictures, *pictures, str(twin)], vlm, counted)
    assert len(calls) == 7
    store.fill(pictures[::-1], vlm, counted)
    assert len(calls) == 7
    assert torch.equal(store.reader()(twin), store.reader()(pictures[3]))


def test_the_order_of_the_paths_does_not_change_a_bit(tmp_path, vlm, pictures):
    make_store(tmp_path / "a", vlm).fill(pictures, vlm, canvas)
    make_store(tmp_path / "b", vlm).fill(pictures[::-1], vlm, canvas)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


def killing(function, step):
    """`function`, but its call number `step` ends the process without any clean-up."""
    counter = itertools.count()

    def call(*args, **kwargs):
        if next(counter) == step:
            os._exit(9)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("what", ["canvas", "fsync", "replace"])
def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bits(tmp_path, vlm, pictures, what, monkeypatch):
    make_store(tmp_path / "whole", vlm).fill(pictures, vlm, canvas)
    for step in itertools.count():
        directory = tmp_path / f"killed-{step}"
        child = os.fork()
        if child == 0:
            try:
                picture = killing(canvas, step) if what == "canvas" else canvas
                if what != "canvas":
                    monkeypatch.setattr(os, what, killing(getattr(os, what), step))
                make_store(directory, vlm).fill(pictures, vlm, picture)
            finally:
                os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        done = {file.name for file in (directory / "shards").glob("*")}
        calls = []
        make_store(directory, vlm).fill(pictures, vlm, lambda path, calls=calls: calls.append(path) or canvas(path))
        assert shards(directory) == shards(tmp_path / "whole")  # nothing else lies there either
        finished = [name for name in done if name.endswith(".safetensors") and not name.startswith(".")]
        assert len(calls) == 7 - sum(3 if name != "00002.safetensors" else 1 for name in finished)
        if not died:
            break
    assert step >= 5


def test_two_ranks_fill_what_one_does(tmp_path, vlm, pictures):
    make_store(tmp_path / "one", vlm).fill(pictures, vlm, canvas)
    seen = [[], []]
    for rank in (1, 0):
        store = make_store(tmp_path / "two", vlm)
        store.fill(pictures, vlm, lambda path, r=rank: seen[r].append(path) or canvas(path), rank=rank, world=2)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert (len(seen[0]), len(seen[1])) == (4, 3)


def test_a_picture_whose_shard_is_not_there_yet_is_reported_as_such(tmp_path, vlm, pictures):
    store = make_store(tmp_path / "store", vlm)
    store.fill(pictures, vlm, canvas, rank=0, world=2)
    reader = store.reader()
    waiting = 0
    for path in pictures:
        try:
            reader(path)
        except FeatureError as error:
            assert "not computed yet" in str(error)
            waiting += 1
    assert waiting == 3


def test_later_pictures_go_into_new_shards_and_leave_the_old_ones(tmp_path, vlm, pictures):
    store = make_store(tmp_path / "store", vlm)
    store.fill(pictures[:4], vlm, canvas)
    before = shards(tmp_path / "store")
    store.fill(pictures, vlm, canvas)
    after = shards(tmp_path / "store")
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()
    assert all(path in store.reader() for path in pictures)


def test_progress_counts_what_earlier_fills_did(tmp_path, vlm, pictures):
    steps = []
    store = make_store(tmp_path / "store", vlm)
    store.fill(pictures, vlm, canvas, rank=0, world=2)
    store.fill(pictures, vlm, canvas, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(3, 7), (6, 7), (7, 7)]


def test_a_store_of_another_tower_size_or_geometry_is_refused_saying_what_differs(tmp_path, vlm, pictures):
    make_store(tmp_path, vlm)
    make_store(tmp_path, make_vlm())  # the same weights: the same tower
    other = fingerprint(make_vlm(seed=1).model.model.vision_tower)
    for changes, field in [
        ({"tower": other}, "tower"),
        ({"geometry": "pad"}, "geometry: square there, pad now"),
        ({"layout": replace(LAYOUT, size=16)}, "size: 8 there, 16 now"),
        ({"layout": replace(LAYOUT, layer=-2)}, "layer: -1 there, -2 now"),
        ({"dtype": torch.bfloat16}, "dtype: torch.float32 there, torch.bfloat16 now"),
    ]:
        with pytest.raises(FeatureError, match=field):
            make_store(tmp_path, vlm, **changes)


def test_an_unknown_or_changed_picture_is_named_with_what_to_do(tmp_path, vlm, pictures):
    store = make_store(tmp_path / "store", vlm)
    store.fill(pictures[:6], vlm, canvas)
    reader = store.reader()
    with pytest.raises(FeatureError, match=r"6\.png: no features.*fill it again"):
        reader(pictures[6])
    Path(pictures[0]).write_text("4711")
    with pytest.raises(FeatureError, match=r"0\.png: no features"):
        reader(pictures[0])
    with pytest.raises(FeatureError, match=r"nothing\.png: .*No such file"):
        reader(str(tmp_path / "nothing.png"))
    assert pictures[1] in reader and pictures[6] not in reader


def test_a_moved_or_touched_picture_is_found_by_its_content(tmp_path, vlm, pictures):
    store = make_store(tmp_path / "store", vlm)
    store.fill(pictures, vlm, canvas)
    before = store.reader()(pictures[2])
    os.utime(pictures[2], (1, 1))
    assert torch.equal(store.reader()(pictures[2]), before)
    Path(pictures[2]).rename(tmp_path / "moved.png")
    assert torch.equal(store.reader()(tmp_path / "moved.png"), before)


def test_reading_hashes_no_file_that_filling_has_hashed(tmp_path, vlm, pictures, monkeypatch):
    store = make_store(tmp_path / "store", vlm)
    store.fill(pictures, vlm, canvas)
    monkeypatch.setattr(storage, "digest", lambda file: pytest.fail(f"{file} was hashed"))
    reader = store.reader()
    for path in pictures:
        reader(path)


def test_an_unreadable_picture_is_fatal_or_skipped_and_named_when_read(tmp_path, vlm, pictures):
    Path(pictures[5]).write_text("not a number")
    gone = str(tmp_path / "gone.png")
    store = make_store(tmp_path / "store", vlm)
    with pytest.raises(FeatureError, match=r"5\.png: cannot be read as a picture: invalid literal"):
        store.fill(pictures, vlm, canvas)
    with pytest.raises(FeatureError, match=r"gone\.png: .*No such file"):
        store.fill([*pictures, gone], vlm, canvas)
    bad = store.fill([*pictures, gone], vlm, canvas, skip_unreadable=True)
    assert sorted(bad) == sorted([pictures[5], gone])
    twin = tmp_path / "twin.png"
    twin.write_text("not a number")
    assert store.fill([*pictures, twin], vlm, canvas, skip_unreadable=True).keys() == {pictures[5], str(twin)}
    assert store.fill(pictures[:5], vlm, canvas, skip_unreadable=True) == {}
    reader = store.reader()
    reader(pictures[4])
    with pytest.raises(FeatureError, match=r"5\.png: cannot be read as a picture"):
        reader(pictures[5])


def test_a_reader_survives_pickling_and_forking_with_open_files(tmp_path, vlm, pictures):
    store = make_store(tmp_path / "store", vlm)
    store.fill(pictures, vlm, canvas)
    reader = store.reader()
    expected = reader(pictures[0])
    assert len(pickle.dumps(reader)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(reader))(pictures[0]), expected)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(reader(pictures[0]), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_shard_of_another_store_is_not_read(tmp_path, vlm, pictures):
    one, two = make_store(tmp_path / "one", vlm), make_store(tmp_path / "two", vlm)
    one.fill(pictures[:3], vlm, canvas)
    two.fill(pictures[3:6], vlm, canvas)
    shard = Path("shards", "00000.safetensors")
    (tmp_path / "two" / shard).replace(tmp_path / "one" / shard)
    with pytest.raises(FeatureError, match="does not belong"):
        one.reader()(pictures[0])
