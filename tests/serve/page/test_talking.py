"""Asking with words and pictures: what is sent, what is shown, and what is still there after a reload."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.page.conftest import Opener
from tests.serve.page.driver import Chat
from tests.serve.page.fake import ENDLESS, Fake, pictures_in, text_of

FIGURES = "document.querySelector('.turn:last-child .figures').innerText"
HEARD = "document.querySelector('#status').textContent"


def decoded(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    assert head.startswith("data:image/") and head.endswith(";base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_dropped_picture_is_asked_about_and_the_answer_comes_in_pieces(chat: Chat, fake: Fake, scene: Path) -> None:
    fake.pause = 0.05
    chat.attach(scene)
    chat.ask("what is this thing", wait=False)
    chat.wait("document.querySelector('.text')?.innerText.startsWith('teacher: what')")
    assert chat("document.querySelector('.answer').getAttribute('aria-busy')") == "true"
    chat.answered()
    assert chat.answers() == ["teacher: what is this thing"]
    assert chat(FIGURES).startswith("5 tokens · ") and "tokens/s · first token after " in chat(FIGURES)
    assert chat(HEARD) == "teacher: teacher: what is this thing"
    (asked,) = fake.asked
    assert asked["model"] == "teacher" and asked["stream"] and asked["temperature"] == 0.2
    assert not {"seed", "max_tokens"} & asked.keys()
    (message,) = asked["messages"]
    assert (message["role"], text_of(message)) == ("user", "what is this thing")
    (url,) = pictures_in(message)
    assert base64.b64decode(url.partition(",")[2]) == scene.read_bytes()  # small enough: as it is
    assert chat("document.activeElement.id") == "question"


def test_a_huge_picture_is_made_smaller_and_a_turned_one_stands_upright(chat: Chat, fake: Fake, tmp_path: Path) -> None:
    Image.new("RGBA", (3200, 1600), (0, 0, 0, 0)).save(tmp_path / "huge.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 40), "red").save(tmp_path / "turned.jpg", exif=turned)
    chat.attach(tmp_path / "huge.png", tmp_path / "turned.jpg")
    chat.ask("and?")
    huge, small = map(decoded, pictures_in(fake.asked[0]["messages"][0]))
    assert huge.size == (1536, 768) and huge.getpixel((9, 9)) == (255, 255, 255)
    assert small.size == (60, 40)  # with its orientation, which the server applies
    assert chat(
        "[...document.querySelectorAll('.thumb img')].map((e) => [e.naturalWidth, e.naturalHeight, e.width > e.height])"
    ) == [
        [1536, 768, True],
        [40, 60, False],
    ]


def test_pictures_can_be_chosen_pasted_described_and_removed(chat: Chat, fake: Fake, scene: Path) -> None:
    document = chat.browser.call("DOM.getDocument")["root"]["nodeId"]
    field = chat.browser.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
    chat.browser.call("DOM.setFileInputFiles", nodeId=field, files=[str(scene)])
    chat.wait("document.querySelectorAll('.attachment').length === 1")
    chat("""(async () => {
        const canvas = new OffscreenCanvas(30, 20);
        canvas.getContext("2d").fillRect(0, 0, 9, 9);
        const data = new DataTransfer();
        data.items.add(new File([await canvas.convertToBlob()], "", { type: "image/png" }));
        const paste = new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
        document.querySelector("#question").dispatchEvent(paste);
    })()""")
    chat.wait("document.querySelectorAll('.attachment').length === 2")
    chat.click(".attachment button")
    assert chat("document.querySelectorAll('.attachment').length") == 1
    chat.click(".attachment input")
    chat("document.querySelector('.attachment input').select()")
    chat.browser.call("Input.insertText", text="a black corner")
    chat.press("Tab")
    chat.ask("what?")
    (url,) = pictures_in(fake.asked[0]["messages"][0])
    assert decoded(url).size == (30, 20)
    assert chat("document.querySelector('.thumb').ariaLabel") == "a black corner: show this picture larger"
    chat.click(".thumb")
    assert chat("document.querySelector('#large[open] img').alt") == "a black corner"
    chat.press("Escape")
    assert chat("document.querySelector('dialog[open]')") is None


def test_a_file_that_is_no_picture_is_told(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a picture")
    chat.drop(tmp_path / "notes.txt")
    assert chat.wait("document.querySelector('#notice').innerText") == "This browser can't read notes.txt as a picture."


def test_another_workflow_goes_on_with_the_conversation(chat: Chat, fake: Fake, scene: Path) -> None:
    chat.attach(scene)
    chat.ask("what is this")
    chat.choose("#left", "student")
    chat.ask("and now")
    chat.choose("#left", "text")
    chat.ask("in words")
    assert [asked["model"] for asked in fake.asked] == ["teacher", "student", "text"]
    seen = [[len(pictures_in(message)) for message in asked["messages"]] for asked in fake.asked]
    assert seen == [[1], [1, 0, 0], [0, 0, 0, 0, 0]]  # a model that takes no pictures gets none
    spoken = [(message["role"], text_of(message)) for message in fake.asked[2]["messages"]]
    assert spoken == [
        ("user", "what is this"),
        ("assistant", "teacher: what is this"),
        ("user", "and now"),
        ("assistant", "student: and now"),
        ("user", "in words"),
    ]
    notes = chat("[...document.querySelectorAll('.answer h3 small')].map((e) => e.innerText)")
    assert notes == ["", "", "takes no pictures: it got the words alone"]
    assert chat("document.querySelector('#choose').disabled") is True


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stopping_ends_the_request_and_keeps_what_came(chat: Chat, fake: Fake, way: str) -> None:
    chat.ask(ENDLESS, wait=False)
    chat.wait("document.querySelector('.text')?.innerText.length > 30")
    chat.press("Escape") if way == "Escape" else chat.click("#stop")
    chat.answered()
    assert chat(FIGURES).startswith("stopped · first token after ")
    assert chat.answers()[0].startswith(f"teacher: {ENDLESS}")
    assert chat("[document.querySelector('#send').hidden, document.querySelector('#stop').hidden]") == [False, True]
    chat.ask("next")  # the server writes to nobody, notices, and answers the next one
    assert fake.left == 1
    assert text_of(fake.asked[1]["messages"][1]).startswith(f"teacher: {ENDLESS}")


def test_while_an_answer_comes_nothing_more_is_sent(chat: Chat, fake: Fake) -> None:
    chat.ask(ENDLESS, wait=False)
    chat.wait("document.querySelector('.text')?.innerText.length > 10")
    chat.write("too early")
    chat.press("Enter")
    assert chat("document.querySelector('#question').value") == "too early"
    chat.press("Escape")
    chat.press("Enter")
    chat.answered()
    assert chat.answers()[1] == "teacher: too early" and len(fake.asked) == 2


def test_a_conversation_survives_a_reload(chat: Chat, fake: Fake, scene: Path) -> None:
    chat.attach(scene)
    chat.ask("what is this")
    chat.choose("#left", "student")
    chat.ask(ENDLESS, wait=False)
    chat.wait("document.querySelectorAll('.text')[1]?.innerText.length > 30")
    chat.open()
    answers = chat.answers()
    assert answers[0] == "teacher: what is this" and answers[1].startswith(f"student: {ENDLESS}")
    assert chat(FIGURES).startswith("stopped")
    assert chat("document.querySelector('#left').value") == "student"
    chat.wait("document.querySelector('.thumb img').naturalWidth === 720")
    chat.ask("again")
    (url,) = pictures_in(fake.asked[-1]["messages"][0])
    assert base64.b64decode(url.partition(",")[2]) == scene.read_bytes()


def test_a_picture_that_the_browser_threw_away_is_told(chat: Chat, scene: Path) -> None:
    chat.attach(scene)
    chat.ask("what is this")
    chat("""new Promise((resolve) => {
        indexedDB.open("distilvlm").onsuccess = ({ target }) => {
            target.result.transaction("pictures", "readwrite").objectStore("pictures").clear().onsuccess = resolve;
        };
    })""")
    chat.open()
    assert chat.answers() == ["teacher: what is this"]
    assert (
        chat("document.querySelector('#notice').innerText")
        == "The browser no longer has a picture of this conversation."
    )


def test_a_browser_that_keeps_nothing_still_talks(chat: Chat, scene: Path) -> None:
    chat("localStorage.setItem('distilvlm.conversation', '[]')")
    broken = "IDBFactory.prototype.open = () => { throw new Error('not here'); }"
    added = chat.browser.call("Page.addScriptToEvaluateOnNewDocument", source=broken)["identifier"]
    chat.open()
    chat.browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added)
    chat.attach(scene)
    chat.ask("what is this")
    assert chat.answers() == ["teacher: what is this"]
    assert chat("document.querySelector('#notice').innerText").endswith("over a reload: not here")


def test_a_new_conversation_begins_and_the_last_one_can_be_had_back(chat: Chat, fake: Fake, scene: Path) -> None:
    chat.attach(scene)
    chat.ask("first")
    chat.click("#new")
    assert chat.answers() == [] and chat("document.querySelector('#welcome').innerText").startswith(
        "Ask about a picture"
    )
    chat.click("#notice button")
    assert chat.answers() == ["teacher: first"]
    chat.click("#new")
    chat.ask("second")
    assert len(fake.asked[-1]["messages"]) == 1
    chat.open()
    assert chat.answers() == ["teacher: second"]
    stored = """new Promise((resolve) => {
        indexedDB.open("distilvlm").onsuccess = ({ target }) => {
            const keys = target.result.transaction("pictures").objectStore("pictures").getAllKeys();
            keys.onsuccess = () => resolve(keys.result.length);
        };
    })"""
    assert chat(stored) == 0


def test_regenerating_asks_the_model_that_is_chosen_now(chat: Chat, fake: Fake) -> None:
    chat.ask("one")
    chat.ask("two")
    actions = chat("[...document.querySelectorAll('.actions')].map((e) => e.innerText.includes('Regenerate'))")
    assert actions == [False, True]
    chat.choose("#left", "student")
    chat.click(".turn:last-child .actions button")
    chat.wait("document.querySelectorAll('.text')[1].innerText === 'student: two'")
    chat.answered()
    assert [text_of(message) for message in fake.asked[-1]["messages"]] == ["one", "teacher: one", "two"]
    assert chat("document.activeElement.id") == "question"


def test_two_models_answer_side_by_side_each_with_its_own_past(chat: Chat, fake: Fake, scene: Path) -> None:
    chat.click("#pair")
    chat.attach(scene)
    chat.ask("what is this")
    chat.ask("and this")
    assert sorted(asked["model"] for asked in fake.asked[:2]) == ["student", "teacher"]
    assert chat.answers() == [
        "teacher: what is this",
        "student: what is this",
        "teacher: and this",
        "student: and this",
    ]
    for asked in fake.asked[2:]:
        assert text_of(asked["messages"][1]) == f"{asked['model']}: what is this"
        assert len(pictures_in(asked["messages"][0])) == 1
    place = "((e) => [e.offsetTop, e.getBoundingClientRect().left])"
    tops = chat(f"[...document.querySelectorAll('.turn:last-child .answer')].map({place})")
    assert tops[0][0] == tops[1][0] and tops[0][1] < tops[1][1]
    chat.open()
    assert len(chat.answers()) == 4 and chat("document.querySelector('#right').value") == "student"
    chat.ask(ENDLESS, wait=False)
    chat.wait(
        "[...document.querySelectorAll('.turn:last-child .text')].filter((e) => e.innerText.length > 30).length === 2"
    )
    chat.press("Escape")
    chat.answered()
    assert chat(
        "[...document.querySelectorAll('.turn:last-child .figures')].every((e) => e.innerText.startsWith('stopped'))"
    )


def test_settings_are_sent_kept_and_checked(chat: Chat, fake: Fake) -> None:
    chat.click("#settings-open")
    chat.browser.call("Input.insertText", text="Be brief.")
    for name, value in {"temperature": "0", "max_tokens": "5", "seed": "7"}.items():
        chat(f"document.querySelector('#{name}').value = '{value}'")
    chat.click("#settings .primary")
    chat.open()
    chat.ask("so")
    asked = fake.asked[0]
    assert (asked["temperature"], asked["max_tokens"], asked["seed"]) == (0, 5, 7)
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    chat.click("#settings-open")
    chat("document.querySelector('#temperature').value = '-3'")
    chat.click("#settings .primary")
    assert chat("document.querySelector('#settings').open") is True  # the form says what is wrong
    chat.press("Escape")
    chat.ask("again")
    assert fake.asked[1]["temperature"] == 0


def test_a_picture_alone_is_not_sent(open_chat: Opener, fake: Fake, scene: Path) -> None:
    chat = open_chat(390)
    chat.attach(scene)
    chat.click("#send")
    assert chat(HEARD) == "Write a question about the picture." and not fake.asked
