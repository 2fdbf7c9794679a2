"""Pictures of the chat page for the docs: `scripts/screenshots --chat`. Its answers are written here, by no model."""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

from distilvlm.data.boxes import REFERRING
from tests.report.browser import Browser, small_png
from tests.serve.page.driver import Chat
from tests.serve.page.fake import MODELS, served
from tests.serve.page.scene import paint, text_of

LONGEST = 200_000  # bytes of a screenshot in the docs

WHAT = "What is on the table?"
WHERE = REFERRING.format(expression="the pear")
EACH = "Where is each thing?"
BREAKFAST = "Could this be somebody's breakfast?"

ANSWERS = {
    ("teacher", WHAT): "Three things stand on a wooden table, from left to right:\n\n"
    "- a **blue enamel mug** with a dark rim, nearly full of coffee\n"
    "- a **pear**, upright, greenish yellow\n"
    "- two **books** lying one on the other, the upper one green, the lower one red\n\n"
    "The wall behind them is plain and grey.",
    ("student", WHAT): "A blue mug with coffee, a yellow pear and two books on a wooden table.",
    ("teacher", BREAKFAST): "A light one: coffee and a pear. The books suggest that whoever eats it is in no hurry.",
    ("student", BREAKFAST): "Yes, there is coffee and a pear on the table.",
    ("grounding", WHERE): text_of("the pear"),
    ("grounding", EACH): "; ".join(f"{name} {text_of(name)}" for name in ("the mug", "the pear", "the books")),
}


def main(docs: Path) -> None:
    browser = Browser()
    try:
        with tempfile.TemporaryDirectory() as directory, served(answers=ANSWERS, pause=0.02, models=MODELS) as fake:
            scene = paint(Path(directory) / "breakfast table.png")
            chat = Chat(browser, fake.address, 1180, height=860, dark=True)
            chat.attach(scene)
            chat.ask(WHAT)
            chat.choose("#left", "grounding")
            chat.ask(EACH)
            _save(browser, docs / "chat-boxes.png")
            chat.click("#new")
            chat.choose("#left", "teacher")
            chat.options = {"height": 760}
            chat.open()
            chat.click("#pair")
            chat.attach(scene)
            chat.ask(WHAT)
            chat.ask(BREAKFAST)
            _save(browser, docs / "chat-side-by-side.png")
            chat.click("#new")
            chat.click("#pair")
            chat.choose("#left", "grounding")
            chat.width, chat.options = 390, {"height": 844, "scale": 1.5}
            chat.open()
            chat.attach(scene)
            chat.ask(WHERE)
            _save(browser, docs / "chat-phone.png")
            chat.close()
    finally:
        browser.close()


def _save(browser: Browser, file: Path) -> None:
    picture = small_png(base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"]))
    if len(picture) > LONGEST:
        raise RuntimeError(f"{file.name} has {len(picture)} bytes, more than {LONGEST}")
    file.write_bytes(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
