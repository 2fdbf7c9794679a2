"""For everybody: phones, dark rooms, keyboards, readers of screens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import distilvlm.report
from tests.report.test_browser import OVERFLOWING
from tests.serve.page.conftest import Opener
from tests.serve.page.driver import Chat
from tests.serve.page.fake import ENDLESS, Fake
from tests.serve.page.scene import BOXES, text_of

EVERYTHING = (
    "; ".join(text_of(name) for name in [*BOXES] * 3) + "\n\n- `code` and " + "x" * 90 + "\n\n```\n" + "y" * 200
)

CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgba(colour).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let box = element; box; box = box.parentElement) {
      const colour = getComputedStyle(box).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const texts = (e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const written = (e) => e.getClientRects().length && (e.matches("input, textarea, select") || texts(e));
  const found = [...document.querySelectorAll("body *")].filter(written).flatMap((e) => {
    const on = light(ground(e));
    const all = [[ratio(light(getComputedStyle(e).color), on), e.outerHTML.slice(0, 80)]];
    if (e.placeholder) all.push([ratio(light(getComputedStyle(e, "::placeholder").color), on), "placeholder"]);
    return all;
  });
  return [found.length, found.filter(([value]) => value < 4.5)];
})()
"""


def talk(chat: Chat, fake: Fake, scene: Path) -> None:
    """A conversation with everything in it: boxes, code, long words, two models, a problem."""
    fake.answers["where?"] = EVERYTHING
    chat.choose("#left", "grounding")
    chat.attach(scene)
    chat.ask("where?")
    chat.click("#pair")
    chat.ask("w" * 120)
    fake.busy = 1
    chat.ask("and?")
    chat.attach(scene)


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_is_wider_than_the_screen(open_chat: Opener, fake: Fake, scene: Path, width: int) -> None:
    chat = open_chat(width)
    assert chat(OVERFLOWING) == [0, width, []]
    talk(chat, fake, scene)
    assert chat(OVERFLOWING) == [0, width, []]
    assert chat("document.querySelector('#composer').getBoundingClientRect().bottom") == 900
    around = "[...document.querySelectorAll('header *, #composer *')]"
    assert chat(f"{around}.filter((e) => e.getBoundingClientRect().right > innerWidth).length") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_the_contrast_of_wcag_aa(open_chat: Opener, fake: Fake, scene: Path, dark: bool) -> None:
    chat = open_chat(dark=dark)
    paper = chat("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert chat(CONTRAST)[1] == []
    talk(chat, fake, scene)
    chat.click("#settings-open")
    count, bad = chat(CONTRAST)
    assert count > 50 and bad == []


def test_colours_can_be_switched_and_stay_so(open_chat: Opener) -> None:
    chat = open_chat(dark=True)
    paper = "getComputedStyle(document.body).backgroundColor"
    chat.click("#theme")
    assert chat(paper) == "rgb(255, 255, 255)" and chat("document.querySelector('#theme').innerText") == "Dark"
    chat.open()
    assert chat(paper) == "rgb(255, 255, 255)"
    chat.click("#theme")  # as the system has it: it goes with the system again
    assert chat(paper) == "rgb(21, 24, 28)" and chat("localStorage.getItem('distilvlm.theme')") is None


def test_the_page_and_the_reports_have_one_palette() -> None:
    style = (Path(distilvlm.report.__file__).parent / "page" / "style.css").read_text()
    palettes = style.partition("* { box-sizing")[0].split("@media (prefers-color-scheme: dark)")
    light, dark = (dict(re.findall(r"(--\w+): (#\w+);", palette)) for palette in palettes)
    own = (Path(distilvlm.report.__file__).parent.parent / "serve" / "page" / "style.css").read_text()
    both = {name: (a, b) for name, a, b in re.findall(r"(--\w+): light-dark\((#\w+), (#\w+)\)", own)}
    shared = both.keys() & light.keys()
    assert len(shared) >= 15
    assert {name: both[name] for name in shared} == {name: (light[name], dark[name]) for name in shared}


def test_every_control_and_picture_has_a_name(chat: Chat, fake: Fake, scene: Path) -> None:
    talk(chat, fake, scene)
    wanted = {"button", "textbox", "combobox", "spinbutton", "link", "image", "dialog", "region"}

    def nameless() -> tuple[int, list[object]]:
        nodes = [
            node
            for node in chat.browser.call("Accessibility.getFullAXTree")["nodes"]
            if not node["ignored"] and node["role"]["value"] in wanted
        ]
        return len(nodes), [node["role"] for node in nodes if not node.get("name", {}).get("value")]

    count, without = nameless()
    assert count > 20 and without == []
    chat.click("#settings-open")
    assert nameless()[1] == []
    described = "[...document.querySelectorAll('[aria-describedby]')].map((e) => e.getAttribute('aria-describedby'))"
    assert chat(f"{described}.filter((id) => !document.getElementById(id))") == []


def test_keys_alone_suffice(chat: Chat, fake: Fake) -> None:
    assert chat("document.activeElement.id") == "question"
    chat.write("one")
    chat.press("Enter", shift=True)
    chat.browser.call("Input.insertText", text="two")
    assert chat("document.querySelector('#question').value") == "one\ntwo" and not fake.asked
    assert chat("document.querySelector('#question').clientHeight") > 60  # it grows
    chat("document.body.tabIndex = -1; document.body.focus()")
    reached = []
    for _ in range(6):
        chat.press("Tab")
        reached.append(chat("document.activeElement.id || document.activeElement.className"))
    assert reached == ["skip", "left", "pair", "new", "settings-open", "theme"]
    chat("document.querySelector('.skip').focus()")
    chat.press("Enter")
    assert chat("document.activeElement.id") == "question"


def test_whoever_wants_no_motion_has_none(chat: Chat, fake: Fake) -> None:
    chat.ask(ENDLESS, wait=False)
    moving = "getComputedStyle(document.querySelector('.answer .text > :last-child'), '::after').animationName"
    chat.wait("document.querySelector('.text')?.innerText.length > 10")
    assert chat(moving) == "pulse"
    wish = {"name": "prefers-reduced-motion", "value": "reduce"}
    chat.browser.call("Emulation.setEmulatedMedia", features=[wish])
    assert chat(moving) == "none"
    chat.press("Escape")
    chat.answered()


def test_without_scripts_the_page_says_what_it_needs(chat: Chat, fake: Fake) -> None:
    chat.browser.open(fake.address, 390, scripts=False)
    shown = chat.browser.call("DOM.getDocument", depth=-1)
    assert "which is switched off in this browser" in str(shown)
    chat.browser.call("Emulation.setScriptExecutionDisabled", value=False)
    chat.open()
