"""Boxes in answers are seen where they are in the picture, and are read as a list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from distilvlm.data.boxes import REFERRING, padded, unpadded
from tests.serve.page.driver import Chat
from tests.serve.page.fake import Fake
from tests.serve.page.scene import BOXES, SIZE, text_of

FRAMES = """[...document.querySelectorAll('.located .box')].map((frame) => {
    const box = frame.getBoundingClientRect(), all = frame.parentElement.getBoundingClientRect();
    return [box.left - all.left, box.top - all.top, box.right - all.left, box.bottom - all.top]
        .map((value, i) => value / (i % 2 ? all.height : all.width));
})"""


def test_every_box_lies_around_its_thing(chat: Chat, fake: Fake, scene: Path) -> None:
    fake.answers["where is each?"] = "; ".join(f"{name} {text_of(name)}" for name in BOXES)
    chat.choose("#left", "grounding")
    chat.attach(scene)
    chat.ask("where is each?")
    frames = chat(FRAMES)
    for frame, box in zip(frames, BOXES.values(), strict=True):
        shares = [value / SIZE[number % 2] for number, value in enumerate(box)]
        assert frame == pytest.approx(shares, abs=0.012)  # two decimals of the square
    listed = chat("[...document.querySelectorAll('.located li')].map((e) => e.innerText)")
    assert listed[0] == "the mug\n13 to 40% across, 43 to 83% down"
    assert [line.split("\n")[0] for line in listed] == [*BOXES]
    assert chat("document.querySelector('#status').textContent").endswith("3 boxes, listed below the picture.")
    chat.choose("#left", "teacher")
    chat.ask("anything else?")
    chat.open()
    assert chat(FRAMES) == [pytest.approx(frame) for frame in frames]  # drawn from what is kept


def test_a_box_is_asked_for_in_the_words_that_models_know(chat: Chat, fake: Fake, scene: Path) -> None:
    assert chat("document.querySelector('#locate').hidden") is True
    chat.choose("#left", "grounding")
    chat.attach(scene)
    chat.write("the pear")
    chat.click("#locate")
    question = REFERRING.format(expression="the pear")
    assert chat("document.querySelector('#question').value") == question
    fake.answers[question] = text_of("the pear")
    chat.press("Enter")
    chat.answered()
    assert chat("document.querySelector('.located b').innerText") == "the pear"


def test_a_box_without_a_picture_is_text_alone(chat: Chat, fake: Fake) -> None:
    chat.ask("[0.1, 0.2, 0.3, 0.4]")
    assert chat.answers() == ["teacher: [0.1, 0.2, 0.3, 0.4]"] and chat("document.querySelector('.located')") is None


@pytest.mark.parametrize("size", [(640, 480), (33, 97), (500, 500)])
def test_the_square_is_that_of_the_data(chat: Chat, size: tuple[int, int]) -> None:
    for box in ((3, 5, 20, 33), (0, 0, *size)):
        shares = padded(box, *size)
        named = json.dumps(dict(zip(("left", "top", "right", "bottom"), shares, strict=True)))
        found = chat(f"import('/boxes.js').then((boxes) => boxes.onPicture({named}, {size[0]}, {size[1]}))")
        left, top, right, bottom = unpadded(shares, *size)
        expected = {"left": left / size[0], "top": top / size[1], "right": right / size[0], "bottom": bottom / size[1]}
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.12, 0.30, 0.45, 0.87]", [["box", False]]),
        ("It is at [.1,.2,.3,.4], beside a dog: [0, 0, 1, 1.0].", [["It is at", False], ["beside a dog", False]]),
        ("[0.5, 0.1, 0.2, 0.4]", [["box", True]]),
        ("[0.1, 0.2, 0.3] [1, 2, 3, 4] [0.1, 0.2, 0.3, 1.5] [-0.1, 0.2, 0.3, 0.4]", []),
    ],
)
def test_boxes_are_found_as_they_are_written(chat: Chat, text: str, expected: list[list[object]]) -> None:
    find = (
        f"import('/boxes.js').then((boxes) => boxes.boxesIn({json.dumps(text)}).map((box) => [box.name, box.inverted]))"
    )
    assert chat(find) == expected


def test_an_inverted_box_is_listed_but_not_drawn(chat: Chat, fake: Fake, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "green").save(tmp_path / "tiny.png")
    fake.answers["where"] = "[0.5, 0.1, 0.2, 0.4]"
    chat.attach(tmp_path / "tiny.png")
    chat.ask("where")
    assert chat("document.querySelector('.located li').innerText") == "box\nends before it begins: not drawn"
    assert chat("document.querySelectorAll('.located .box').length") == 0
    assert chat("document.querySelector('.canvas img').getBoundingClientRect().width") > 300  # enlarged
