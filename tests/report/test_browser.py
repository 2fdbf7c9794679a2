"""The page in a headless Chromium, at desktop and phone width, in light and dark, with JavaScript and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import Browser, program

pytestmark = pytest.mark.skipif(program() is None, reason="no chromium or chrome on PATH")

OVERFLOWING = """
(() => {
  const width = document.documentElement.clientWidth;
  const scrolls = (element) => {
    for (let box = element.parentElement; box; box = box.parentElement) {
      if (getComputedStyle(box).overflowX !== "visible") return true;
    }
    return false;
  };
  const name = (element) => `${element.tagName}.${element.getAttribute("class")}`;
  const wide = [...document.querySelectorAll("main *, nav *")].filter((element) => {
    const box = element.getBoundingClientRect();
    return box.width && (box.right > width + 1 || box.left < -1) && !scrolls(element);
  });
  return [document.documentElement.scrollWidth - width, width, wide.map(name)];
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    running = Browser()
    yield running
    running.close()


@pytest.fixture(scope="module")
def pages(
    run_page: str, comparison_page: str, sparse_page: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pages")
    made = {"run": run_page, "comparison": comparison_page, "sparse": sparse_page}
    for name, page in made.items():
        (directory / f"{name}.html").write_text(page)
    return {name: directory / f"{name}.html" for name in made}


@pytest.mark.parametrize("name", ["run", "comparison", "sparse"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    browser.open(pages[name], width)
    browser.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    assert browser.evaluate(OVERFLOWING) == [0, width, []]
    contents = browser.evaluate("document.querySelector('.contents').getClientRects().length")
    assert contents == (width > 1000)  # beside the page where there is room


def test_without_scripts_everything_stands_there(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["comparison"], 390, scripts=False)
    assert browser.evaluate(OVERFLOWING) == [0, 390, []]
    hidden = (
        "[...document.querySelectorAll('.card, .chart, .scores tr')].filter((e) => !e.getClientRects().length).length"
    )
    assert browser.evaluate(hidden) == 0
    assert browser.evaluate("document.querySelectorAll('.filter').length") == 0


def test_samples_can_be_filtered(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["comparison"], 1280)
    shown = "[...document.querySelectorAll('.card')].filter((e) => e.getClientRects().length).length"
    everything = browser.evaluate(shown)
    choose = "document.querySelector('.filter select').selectedIndex = 2;"
    tell = "document.querySelector('.filter').dispatchEvent(new Event('input'))"
    browser.evaluate(f"{choose}{tell}")
    assert everything > 1 and browser.evaluate(shown) == 1
    assert "q-control-only" in browser.evaluate("document.querySelector('main').innerText")
    assert "q-all-right" not in browser.evaluate("document.querySelector('main').innerText")


CONTRAST = """
(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let box = element; box; box = box.parentElement) {
      const colour = getComputedStyle(box).backgroundColor;
      if (!colour.endsWith(", 0)")) return colour;
    }
  };
  const texts = [...document.querySelectorAll("main p, main td, main th, main small, main a, main summary, mark span")];
  return Math.min(...texts.filter((e) => e.innerText?.trim()).map((element) => {
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
})()
"""


@pytest.mark.parametrize("name", ["comparison", "sparse"])
@pytest.mark.parametrize("dark", [False, True])
def test_text_has_the_contrast_of_wcag_aa(browser: Browser, pages: dict[str, Path], dark: bool, name: str) -> None:
    browser.open(pages[name], 1280, dark=dark)
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert browser.evaluate(CONTRAST) >= 4.5


@pytest.mark.parametrize("width", [1280, 390])
def test_every_map_of_experts_is_seen_as_high_as_its_rows(browser: Browser, pages: dict[str, Path], width: int) -> None:
    browser.open(pages["sparse"], width, scripts=False)
    maps = "[...document.querySelectorAll('svg.experts')].map((e) => e.getBoundingClientRect())"
    shown = browser.evaluate(f"{maps}.map((box) => [Math.round(box.height), box.width > 150])")
    assert shown == [[4 * 13 - 1, True]] * 4  # two layers in each of two stages
    colours = browser.evaluate(
        "[...new Set([...document.querySelectorAll('.experts path')].map((e) => getComputedStyle(e).fill))].length"
    )
    assert colours == 3  # less than an even share, even, more
