"""An address that speaks OpenAI's protocol: a paid service, or a server of one's own (vLLM, llama.cpp, Ollama).

Asked with the standard library alone.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

URL, KEY, MODEL = "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"
"""Environment variables; the key is never an option, since options stand in histories and process lists."""

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP states after which the same question is asked again."""


class JudgeError(RuntimeError):
    """The judge can't be asked: the message says what to do."""


@dataclass(frozen=True)
class Endpoint:
    """An address that answers chat completions.

    Args:
        url: up to and with /v1.
        key: sent as a bearer token; None for servers that want none.
        attempts: how often a question is asked before it is given up.
        wait: seconds before the second attempt; doubled for each further one, unless the server names a time.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    attempts: int = 6
    wait: float = 2.0

    @classmethod
    def from_environment(cls, url: str | None = None, model: str | None = None) -> Endpoint:
        """`url` and `model`, or the environment's. Raises JudgeError where one is missing."""
        url, model = url or os.environ.get(URL), model or os.environ.get(MODEL)
        if not url or not model:
            missing = " and ".join(name for name, value in ((URL, url), (MODEL, model)) if not value)
            raise JudgeError(f"the judge has no address or model: set {missing} (and {KEY}, if it wants a key)")
        if not url.startswith(("http://", "https://")):
            raise JudgeError(f"the judge's address '{url}' must begin with http:// or https://")
        return cls(url, model, os.environ.get(KEY) or None)

    def ask(self, prompt: str) -> str:
        """The reply to one message, at temperature 0.

        Raises:
            JudgeError: it was refused, or did not answer in all attempts.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        problem = ""
        for attempt in range(self.attempts):
            pause = self.wait * 2**attempt
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return _content(json.loads(reply.read()))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(500).decode(errors='replace').strip()}"
                if error.code not in PASSING:
                    raise JudgeError(f"{self.url} refused the question ({problem}): see model and {KEY}") from None
                named = error.headers.get("Retry-After", "")
                pause = float(named) if named.isdigit() else pause
            except (OSError, http.client.HTTPException, ValueError) as error:
                # refused or broken connections, time-outs, and replies that are no completion
                problem = f"{type(error).__name__}: {error}"
            if attempt + 1 < self.attempts:
                logger.warning("the judge did not answer (%s); again in %.0f s", problem, pause)
                time.sleep(pause)
        raise JudgeError(
            f"{self.url} did not answer in {self.attempts} attempts ({problem}): the same command goes on from here"
        )


def _content(reply: Any) -> str:
    try:
        return str(reply["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no completion: {json.dumps(reply)[:200]}") from None
