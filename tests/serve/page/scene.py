"""A picture to ask about: things on a table, with their true boxes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from distilvlm.data.boxes import written

SIZE = (720, 480)
BOXES = {"the mug": (92, 206, 290, 396), "the pear": (356, 236, 470, 400), "the books": (496, 300, 676, 402)}


def text_of(name: str) -> str:
    """The true box of a thing, as models write it."""
    return written(BOXES[name], SIZE)


def paint(file: Path) -> Path:
    """Write the picture, as its suffix says."""
    big = Image.new("RGB", (SIZE[0] * 2, SIZE[1] * 2), "#dfe6e4")
    pen = ImageDraw.Draw(big)
    for y in range(big.height):
        shade = y / big.height
        pen.line((0, y, big.width, y), (int(226 - 30 * shade), int(232 - 26 * shade), int(228 - 22 * shade)))
    pen.rectangle((0, 720, big.width, big.height), "#b98d63")
    pen.rectangle((0, 720, big.width, 734), "#c99d72")
    shadows = Image.new("L", big.size)
    dark = ImageDraw.Draw(shadows)
    for left, _, right, bottom in BOXES.values():
        dark.ellipse((2 * left - 6, 2 * bottom - 34, 2 * right + 50, 2 * bottom + 22), 120)
    big.paste("#4e3420", mask=shadows.filter(ImageFilter.GaussianBlur(16)))
    # The mug: body, rim, handle.
    pen.ellipse((430, 480, 580, 690), outline="#2f6f8f", width=34)
    pen.rounded_rectangle((184, 436, 500, 792), 44, "#3a83a7")
    pen.rounded_rectangle((184, 436, 270, 792), 44, "#4f9bc0")
    pen.ellipse((184, 412, 500, 476), "#2b5d78")
    pen.ellipse((200, 424, 484, 470), "#5b3a24")
    # The pear: two rounds and a stem.
    pen.ellipse((712, 600, 940, 800), "#c3b43c")
    pen.ellipse((756, 506, 896, 720), "#c3b43c")
    pen.ellipse((742, 640, 800, 730), "#d8cb62")
    pen.line((826, 514, 838, 474), "#5d4526", 12)
    # The books, lying.
    pen.rounded_rectangle((992, 690, 1352, 804), 10, "#9c3b34")
    pen.rectangle((1010, 706, 1352, 788), "#f1ead9")
    for y in range(714, 786, 10):
        pen.line((1010, y, 1350, y), "#d8cfb9", 2)
    pen.rounded_rectangle((992, 600, 1300, 694), 10, "#35604c")
    pen.rectangle((1008, 614, 1300, 680), "#f1ead9")
    big.resize(SIZE, Image.Resampling.LANCZOS).save(file)
    return file
