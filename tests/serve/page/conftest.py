"""One browser for the page's tests, the page opened at a server of each test's own, and a picture to ask about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.report.browser import Browser, program
from tests.serve.page.driver import Chat
from tests.serve.page.fake import Fake, served
from tests.serve.page.scene import paint

Opener = Callable[..., Chat]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if program() is None:
        pytest.skip("no chromium or chrome on PATH")
    running = Browser()
    yield running
    running.close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    with served() as running:
        yield running


@pytest.fixture
def open_chat(browser: Browser, fake: Fake) -> Iterator[Opener]:
    """Opens the page of `fake`. Nothing may go wrong in it unseen."""
    with ExitStack() as stack:

        def opened(width: int = 1280, **options: Any) -> Chat:
            chat = Chat(browser, fake.address, width, **options)
            stack.callback(chat.close)
            return chat

        yield opened


@pytest.fixture
def chat(open_chat: Opener) -> Chat:
    return open_chat()


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("scene") / "breakfast.png")
