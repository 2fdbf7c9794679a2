"""Boxes drawn into their pictures: one sheet with the true boxes and every model's, expressions as captions."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

from distilvlm.data.boxes import padded
from distilvlm.data.geometry import GREY, PictureError, decode
from distilvlm.evaluate.measures import Answered
from distilvlm.evaluate.report import Evaluation
from distilvlm.models.files import write_whole

COLOURS = ("#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#9467bd")
"""Of the models, in order (Okabe and Ito's, which colour-blind people can tell apart)."""
TRUE = "#00a35c"

SIDE = 320
"""Pixels of a padded square on the sheet."""
GAP = 14
TEXT, LINE = 15, 20
CAPTION_LINES = 2

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw(rows: Mapping[str, Evaluation], file: str | Path, *, limit: int = 24, columns: int = 4) -> int:
    """Write a PNG of at most `limit` questions, spread evenly over all; returns how many are on it.

    Pictures are shown as the padded squares that the models answer about; one that can't be read is grey.

    Args:
        rows: name → evaluation by the grounding measure, all of the same questions.

    Raises:
        ValueError: there are more models than colours.
    """
    names = list(rows)
    if len(names) > len(COLOURS):
        raise ValueError(f"{len(names)} models can't be told apart in one picture: draw {len(COLOURS)} at most")
    total = len(rows[names[0]].samples)
    count = min(limit, total)
    shown = [number * total // count for number in range(count)]
    across = min(columns, count)
    down = -(-count // across)
    font = ImageFont.load_default(TEXT)
    tile = SIDE + LINE * (CAPTION_LINES + len(names))
    legend = _legend(names, across * (SIDE + GAP) - GAP, font)
    top = GAP + LINE * len(legend) + GAP // 2
    sheet = Image.new("RGB", (GAP + across * (SIDE + GAP), top + down * (tile + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(legend):
        x = float(GAP)
        for name, colour in line:
            pen.text((x, GAP + LINE * number), name, colour, font)
            x += font.getlength(name) + 2 * GAP
    for place, number in enumerate(shown):
        left = GAP + place % across * (SIDE + GAP)
        _tile(sheet, left, top + place // across * (tile + GAP), {name: rows[name].samples[number] for name in names})
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    write_whole(file, content.getvalue())
    return count


def _tile(sheet: Image.Image, left: int, top: int, samples: Mapping[str, Answered]) -> None:
    """One picture with everybody's boxes, the expression and what each box is worth."""
    font = ImageFont.load_default(TEXT)
    first = next(iter(samples.values()))
    square = _square(first)
    pen = ImageDraw.Draw(square)
    for box in first.details["true"]:
        _rectangle(pen, _corners(box, first), TRUE, 4)
    for colour, sample in zip(COLOURS, samples.values(), strict=False):
        for box in sample.details["boxes"]:
            _rectangle(pen, _corners(box, sample), colour, 2)
    sheet.paste(square, (left, top))
    pen = ImageDraw.Draw(sheet)
    expression = first.question.rpartition(": ")[2] or first.question
    for number, line in enumerate(_wrapped(expression, font)):
        pen.text((left, top + SIDE + LINE * number), line, "black", font)
    for number, ((name, sample), colour) in enumerate(zip(samples.items(), COLOURS, strict=False)):
        y = top + SIDE + LINE * (CAPTION_LINES + number)
        pen.text((left, y), _cut(f"{name}: {sample.details['verdict']}", font), colour, font)


def _square(sample: Answered) -> Image.Image:
    """The picture in the middle of a grey square."""
    width, height = sample.details["size"]
    square = Image.new("RGB", (SIDE, SIDE), GREY)
    try:
        picture = decode(sample.pictures[0])
    except PictureError:
        return square
    left, top, right, bottom = (round(SIDE * edge) for edge in padded((0, 0, width, height), width, height))
    square.paste(picture.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC), (left, top))
    return square


def _corners(box: Sequence[float], sample: Answered) -> tuple[float, float, float, float]:
    """On the square; an inverted box is drawn like its mirror image, and called inverted below."""
    width, height = sample.details["size"]
    xs, ys = (sorted(SIDE * edge for edge in padded(box, width, height)[axis::2]) for axis in (0, 1))
    return xs[0], ys[0], xs[1], ys[1]


def _rectangle(pen: ImageDraw.ImageDraw, box: tuple[float, float, float, float], colour: str, width: int) -> None:
    """With a white edge on both sides, so that it shows on any picture."""
    left, top, right, bottom = box
    pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white", width=width + 2)
    pen.rectangle(box, outline=ImageColor.getrgb(colour), width=width)


def _legend(names: Sequence[str], width: int, font: Font) -> list[list[tuple[str, str]]]:
    """Lines of names in their colours."""
    lines: list[list[tuple[str, str]]] = [[]]
    used = 0.0
    for name, colour in zip(("true box", *names), (TRUE, *COLOURS), strict=False):
        needed = font.getlength(name) + 2 * GAP
        if lines[-1] and used + needed > width:
            lines.append([])
            used = 0.0
        lines[-1].append((name, colour))
        used += needed
    return lines


def _wrapped(text: str, font: Font) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= SIDE:
            lines[-1] = longer
        elif len(lines) == CAPTION_LINES:
            lines[-1] = _cut(longer, font)
            break
        else:
            lines.append(word)
    return [_cut(line, font) for line in lines]


def _cut(text: str, font: Font) -> str:
    if font.getlength(text) <= SIDE:
        return text
    while text and font.getlength(f"{text}...") > SIDE:
        text = text[:-1]
    return f"{text}..."
