"""The page at the real server, in front of an engine that repeats what it is told, and of a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

from distilvlm.serve.loading import around
from distilvlm.serve.settings import Settings
from tests.report.browser import Browser
from tests.serve.fake_engine import FakeEngine
from tests.serve.page.driver import Chat
from tests.serve.page.fake import text_of
from tests.serve.running import ask, serving
from tests.serve.small_models import vlm


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
        assert figures.startswith("3 tokens · ") and "first token after " in figures  # no speed, if all came at once
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


def test_workflows_of_one_model_say_on_the_page_what_they_say_elsewhere(browser: Browser, scene: Path) -> None:
    engine = around(vlm(adaptors=True), "tiny", "pad", "chat")
    settings = {"temperature": "0", "max_tokens": "9"}
    with serving(engine) as server:
        chat = Chat(browser, f"{server.url}/")
        names = chat("[...document.querySelectorAll('#left option')].map((e) => e.value)")
        assert names == ["text", "seeing", "grounding"]
        chat(f"localStorage.setItem('distilvlm.settings', {json.dumps(json.dumps(settings))})")
        chat.choose("#left", "seeing")
        chat.click("#pair")
        chat.choose("#right", "grounding")
        chat.attach(scene)
        chat("""window.bodies = []; const ask = window.fetch; window.fetch = (...given) => {
            if (given[1].body) bodies.push(given[1].body);
            return ask(...given);
        }""")
        chat.ask("what is it")
        answers = chat("JSON.parse(localStorage.getItem('distilvlm.conversation'))[0].answers")
        bodies = [json.loads(body) for body in chat("bodies")]
        chat.close()
        assert len(bodies) == 2 and answers[0]["text"] != answers[1]["text"]
        for answer in answers:
            (body,) = (body for body in bodies if body["model"] == answer["model"])
            assert text_of(body["messages"][0]) == "what is it"
            del body["stream"], body["stream_options"]
            status, _, told = ask(server, "POST", "/v1/chat/completions", body)
            assert (status, told["choices"][0]["message"]["content"]) == (200, answer["text"])
            assert told["usage"]["completion_tokens"] == answer["tokens"] == 9
