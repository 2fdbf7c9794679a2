"""Whatever goes wrong is told in plain words, with a way on."""

from __future__ import annotations

from tests.serve.page.conftest import Opener
from tests.serve.page.driver import Chat
from tests.serve.page.fake import BREAK, Fake, served

PROBLEM = "document.querySelector('.problem p')?.innerText"


def press(chat: Chat, label: str) -> None:
    number = chat(
        f"[...document.querySelectorAll('.problem button')].findIndex((e) => e.innerText.startsWith('{label}'))"
    )
    chat.click(f".problem button:nth-of-type({number + 1})")


def test_a_busy_server_is_asked_again_when_it_says(chat: Chat, fake: Fake) -> None:
    fake.busy = 1
    chat.ask("hello")
    assert chat(PROBLEM) == "The server is busy: it has as many questions as it can queue."
    assert chat("document.querySelector('.problem button').innerText") == "Try again in 1 s"
    chat.wait("document.querySelector('.problem button').innerText === 'Try again'")
    press(chat, "Try again")
    chat.wait("document.querySelector('.text')?.innerText === 'teacher: hello'")
    assert chat(PROBLEM) is None and len(fake.asked) == 1


def test_a_key_is_asked_for_and_forgotten_with_the_tab(open_chat: Opener, fake: Fake) -> None:
    fake.key = "open sesame".replace(" ", "-")
    chat = open_chat()
    assert chat(PROBLEM) == "This server wants an API key."
    press(chat, "Enter the key")
    assert chat("document.activeElement.id") == "key"
    chat.browser.call("Input.insertText", text="wrong")
    chat.press("Enter")
    chat.wait(f"{PROBLEM} === 'The server does not know this API key.'")
    press(chat, "Enter the key")
    chat("document.activeElement.select()")
    chat.browser.call("Input.insertText", text=fake.key)
    chat.press("Enter")
    chat.wait("document.querySelectorAll('#left option').length === 4")
    chat.ask("hello")
    assert chat.answers() == ["teacher: hello"]
    assert fake.key not in chat("JSON.stringify(localStorage)") and fake.key in chat("JSON.stringify(sessionStorage)")


def test_a_key_that_is_changed_meanwhile_is_told_at_the_answer(chat: Chat, fake: Fake) -> None:
    fake.key = "new"
    chat.ask("hello")
    assert chat(f"[{PROBLEM}, document.querySelector('.problem').closest('.answer') !== null]") == [
        "This server wants an API key.",
        True,
    ]


def test_an_answer_that_breaks_off_keeps_what_came(chat: Chat, fake: Fake) -> None:
    chat.ask(BREAK)
    assert chat.answers() == [f"teacher: {BREAK}"]
    assert chat(PROBLEM) == "The answer broke off: the server closed the connection."


def test_a_server_that_is_gone_is_told_and_the_question_is_not_lost(open_chat: Opener, fake: Fake) -> None:
    with served() as gone:
        chat = open_chat()
        chat.address = gone.address
        chat.open()
    chat.ask("hello")
    assert chat(PROBLEM).startswith("The server does not answer.")
    assert chat("document.querySelector('.question').innerText") == "hello"
    assert chat("document.querySelector('.problem button').innerText") == "Try again"


def test_an_unanswered_question_goes_along_with_the_next_one(chat: Chat, fake: Fake) -> None:
    fake.busy = 1
    chat.ask("first")
    chat.ask("second")
    assert fake.asked[0]["messages"] == [{"role": "user", "content": "first\nsecond"}]
    assert chat("document.querySelectorAll('.problem button').length") == 0  # only the last one can be asked again


def test_an_unreachable_list_of_models_can_be_asked_for_again(open_chat: Opener, fake: Fake) -> None:
    fake.models = []
    chat = open_chat()
    assert chat(PROBLEM) == "This server has no models."
    fake.models = [{"id": "late", "sees": True, "boxes": False, "context": 9, "parameters": 9, "geometry": "pad"}]
    press(chat, "Try again")
    chat.wait("document.querySelector('#left').value === 'late'")
    assert chat("document.querySelector('#pair').hidden") is True  # nobody to put beside it
