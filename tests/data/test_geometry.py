"""Canvases are Pillow's own pixels, and what is no picture is said so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from distilvlm.data import geometry
from distilvlm.data.geometry import PictureError
from distilvlm.recipe.schema import Augmentation


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processed(processor, image) -> torch.Tensor:
    pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    return pixels.to(torch.uint8)


@pytest.mark.parametrize(("width", "height"), [(31, 31), (57, 22), (19, 64), (100, 99), (28, 28)])
def test_stock_processors_make_the_same_pixels(width, height):
    image, size = noise(width, height), {"height": 28, "width": 28}
    square = CLIPImageProcessorPil(size=size, do_center_crop=False)
    crop = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    pad = LlavaImageProcessorPil(do_pad=True, size=size, do_center_crop=False, image_mean=[0.5, 0.25, 0.75])
    assert processed(square, image).equal(geometry.canvas(image, "square", 28))
    assert processed(crop, image).equal(geometry.canvas(image, "crop", 28))
    assert processed(pad, image).equal(geometry.canvas(image, "pad", 28, (127, 63, 191)))


def test_decode_turns_upright_and_puts_transparency_on_white(tmp_path):
    image = noise(8, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    upright = geometry.decode(str(tmp_path / "turned.png"))
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    clear.save(tmp_path / "clear.png")
    pixels = np.asarray(geometry.decode(str(tmp_path / "clear.png")))
    assert pixels[0, 0].tolist() == [10, 20, 30] and pixels[1, 1].tolist() == [255, 255, 255]
    Image.fromarray(np.full((4, 4), 0x8040, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (np.asarray(geometry.decode(str(tmp_path / "deep.png"))) == 0x80).all()


def test_what_is_no_picture_is_named(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("hello")
    noise(40, 40).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with pytest.raises(PictureError, match=r"gone\.png: no such file"):
        geometry.decode(str(tmp_path / "gone.png"))
    with pytest.raises(PictureError, match=r"text\.png can't be read"):
        geometry.header(str(tmp_path / "text.png"))
    assert geometry.header(str(tmp_path / "cut.png")) == (40, 40)
    with pytest.raises(PictureError, match=r"cut\.png can't be read"):
        geometry.decode(str(tmp_path / "cut.png"))
    monkeypatch.setattr(geometry, "MAX_PIXELS", 1599)
    with pytest.raises(PictureError, match=r"40 x 40 pixels are more than 1599"):
        geometry.header(str(tmp_path / "whole.png"))
    with pytest.raises(PictureError, match="too thin"):
        geometry.canvas(Image.new("RGB", (1, 300)), "crop", 16)
    with pytest.raises(PictureError, match="padded to a square"):
        geometry.canvas(Image.new("RGB", (1, 300)), "pad", 16)


def test_a_program_under_a_picture_s_name_is_not_run(tmp_path):
    """Pillow would hand EPS to Ghostscript."""
    noise(8, 8).save(tmp_path / "drawn.png", "EPS")
    assert Image.open(tmp_path / "drawn.png").format == "EPS"
    with pytest.raises(PictureError, match="cannot identify image file"):
        geometry.header(str(tmp_path / "drawn.png"))


def augmented(spec: Augmentation, *key: int) -> np.ndarray:
    return np.asarray(geometry.augment(noise(30, 20), spec, geometry.augmentation_rng(*key)))


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    spec = Augmentation(flip=0.5, crop=0.3, brightness=0.4)
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    one = augmented(spec, 1, 2, 3)
    np.random.default_rng(5).random(7)
    assert np.array_equal(one, augmented(spec, 1, 2, 3))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not np.array_equal(one, augmented(spec, *other))
    assert before[0].equal(torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


def test_each_augmentation_does_what_it_says():
    image = np.asarray(noise(30, 20))
    assert np.array_equal(augmented(Augmentation(), 0, 0, 0), image)
    assert np.array_equal(augmented(Augmentation(flip=1.0), 0, 0, 0), image[:, ::-1])
    for index in range(20):
        height, width, _ = augmented(Augmentation(crop=0.25), 0, 0, index).shape
        assert 0.23 <= width * height / 600 <= 1
    bright = augmented(Augmentation(brightness=0.5), 0, 0, 0).astype(float).mean() / image.mean()
    assert 0.4 < bright < 1.6 and abs(bright - 1) > 0.01
