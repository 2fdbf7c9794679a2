"""A headless Chromium over its debugging pipe: true phone widths, dark mode and no JavaScript, with nothing to install.

`scripts/screenshots REPORT.html` writes `docs/report-desktop.png` and `docs/report-phone.png` with it.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LONGEST = 400_000  # bytes of a screenshot in the docs


def program() -> str | None:
    """The browser on PATH, if there is one."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """One browser process with one page."""

    def __init__(self) -> None:
        path = program()
        if path is None:
            raise RuntimeError(f"no browser on PATH: none of {', '.join(PROGRAMS)}")
        self._profile = tempfile.mkdtemp(prefix="browser-")
        to_browser, self._write = (_high(end) for end in os.pipe())
        self._read, from_browser = (_high(end) for end in os.pipe())
        arguments = [path, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        arguments += ["--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={self._profile}"]
        null = os.open(os.devnull, os.O_RDWR)
        # The pipe's ends are 3 and 4 by agreement.
        actions = [
            (os.POSIX_SPAWN_DUP2, end, at) for end, at in ((null, 1), (null, 2), (to_browser, 3), (from_browser, 4))
        ]
        self._process = os.posix_spawn(path, arguments, os.environ, file_actions=actions, setpgroup=0)
        for end in (to_browser, from_browser, null):
            os.close(end)
        self._number, self._buffer, self._session = 0, b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def open(
        self,
        page: Path | str,
        width: int,
        *,
        height: int = 900,
        dark: bool = False,
        scripts: bool = True,
        scale: float = 1,
    ) -> None:
        """Load a file or an address at a size in CSS pixels; narrower than 600 as a phone does."""
        size: dict[str, Any] = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; of a promise, what it comes to."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 10) -> Any:
        """The first value of an expression that is true.

        Raises:
            TimeoutError: there was none in time.
        """
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {seconds} s: {expression}")
            time.sleep(0.02)
        return value

    def screenshot(self, top: int, width: int, height: int) -> bytes:
        """PNG of a part of the page, in CSS pixels."""
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        taken = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        asked: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def close(self) -> None:
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._read, 1 << 20)
            if not more:
                raise RuntimeError("the browser ended")
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


def _high(end: int) -> int:
    """The same file under a number above those that the browser's ends get."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved


def small_png(png: bytes) -> bytes:
    """The same pixels in fewer bytes. No palette: 256 colours chosen by area would make two models' lines alike."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main(report: Path, docs: Path) -> None:
    browser = Browser()
    try:
        for name, width, height, scale in (("desktop", 1280, 2000, 1), ("phone", 390, 1500, 1.5)):
            browser.open(report, width, scale=scale)
            picture = small_png(browser.screenshot(0, width, height))
            if len(picture) > LONGEST:
                raise RuntimeError(f"report-{name}.png has {len(picture)} bytes, more than {LONGEST}")
            (docs / f"report-{name}.png").write_bytes(picture)
    finally:
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
