"""What a user does on the chat page, in a headless Chromium: real keys, real drops, real clicks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.report.browser import Browser

WATCH = """
window.wrong = [];
addEventListener("error", (event) => wrong.push(String(event.message)));
addEventListener("unhandledrejection", (event) => wrong.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI }) => {
  wrong.push(`${violatedDirective} ${blockedURI}`);
});
"""


class Chat:
    """The page, opened. Errors and breaches of the content policy are told when it is closed."""

    def __init__(self, browser: Browser, address: str, width: int = 1280, **options: Any) -> None:
        self.browser, self.address, self.width, self.options = browser, address, width, options
        self.watch = browser.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)["identifier"]
        self.open()

    def open(self) -> None:
        self.browser.open(self.address, self.width, **self.options)
        self.ready()

    def ready(self) -> None:
        self.browser.wait("document.body?.dataset.ready !== undefined")

    def close(self) -> None:
        """Leave the page.

        Raises:
            AssertionError: something went wrong in it that nobody was told.
        """
        wrong = self("window.wrong")
        self.browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=self.watch)
        assert wrong == []

    def __call__(self, expression: str) -> Any:
        return self.browser.evaluate(expression)

    def wait(self, expression: str) -> Any:
        return self.browser.wait(expression)

    def write(self, text: str) -> None:
        self("document.querySelector('#question').focus()")
        self.browser.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        event: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 * shift}
        text = {"text": "\r"} if key == "Enter" else {}
        self.browser.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.browser.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def ask(self, text: str, *, wait: bool = True) -> None:
        self.write(text)
        self.press("Enter")
        if wait:
            self.answered()

    def answered(self) -> None:
        self.wait("document.querySelector('#question').value === '' && !document.querySelector('[aria-busy=true]')")

    def click(self, selector: str) -> None:
        box = self(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{ block: "center", behavior: "instant" }});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        where: dict[str, Any] = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.browser.call("Input.dispatchMouseEvent", type=kind, **where)

    def drop(self, *files: Path) -> None:
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.browser.call("Input.dispatchDragEvent", type=kind, x=self.width // 3, y=300, data=data)

    def attach(self, *files: Path) -> None:
        """Drop files, and wait until they lie beside the message."""
        before = self("document.querySelectorAll('.attachment').length")
        self.drop(*files)
        self.wait(f"document.querySelectorAll('.attachment').length === {before + len(files)}")

    def choose(self, select: str, name: str) -> None:
        self(f"""(() => {{
            const select = document.querySelector({json.dumps(select)});
            select.value = {json.dumps(name)};
            select.dispatchEvent(new Event("change", {{ bubbles: true }}));
        }})()""")

    def answers(self) -> list[str]:
        return self("[...document.querySelectorAll('.answer .text')].map((e) => e.innerText)")
