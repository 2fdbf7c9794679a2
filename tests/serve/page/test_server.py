"""The page at the real server, in front of an engine that repeats what it is told."""

from __future__ import annotations

from pathlib import Path

from distilvlm.serve.settings import Settings
from tests.report.browser import Browser
from tests.serve.fake_engine import FakeEngine
from tests.serve.page.driver import Chat
from tests.serve.running import serving


def test_a_conversation_with_the_real_server(browser: Browser, scene: Path) -> None:
    engine = FakeEngine()
    with serving(engine, settings=Settings(key="secret")) as server:
        chat = Chat(browser, f"{server.url}/")
        chat("sessionStorage.setItem('distilvlm.key', 'secret')")
        chat.open()
        chat.attach(scene)
        chat.ask("two words")
        assert chat.answers() == ["720x480 two words"]
        figures = chat("document.querySelector('.figures').innerText")
        assert figures.startswith("3 tokens · ") and figures.count("token") == 3
        chat.choose("#left", "parrot-text")
        chat.ask("no picture")
        assert [len(request.pictures) for request in engine.requests] == [1, 0]

        chat.click("#pair")
        engine.stand_still_after = 1
        chat.ask("stands still", wait=False)
        chat.wait("document.querySelectorAll('.turn:last-child .text').length === 2")
        chat.wait("[...document.querySelectorAll('.turn:last-child .text')].every((e) => e.innerText)")
        chat.press("Escape")
        chat.answered()
        chat.wait("document.querySelectorAll('.turn:last-child .figures')[1].innerText.startsWith('stopped')")

        engine.places = 0
        chat.ask("one too many")
        assert chat("document.querySelector('.problem p').innerText").startswith("The server is busy")
        assert chat("document.querySelector('.problem button').innerText").startswith("Try again in ")
        chat.close()
    assert len(engine.cancelled) == 2  # both were told that nobody waits any more
