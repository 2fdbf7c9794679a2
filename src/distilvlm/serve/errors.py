"""What went wrong, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .interface import Busy, Draining, Failed, NotFinite, Refused

logger = logging.getLogger(__name__)


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Problem


class ApiError(Exception):
    """An answer that says why there is none.

    Args:
        status: of HTTP.
        message: for people.
        param: the field of the request that is wrong.
        code: for programs.
        retry_after: seconds after which to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        message, param = (_writable(text) for text in (str(self), self.param))
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body, self.status, {**self.headers, **(headers or {})})


def _writable(text: str | None) -> str | None:
    """What a client sent may stand in a message, and need not be text."""
    return None if text is None else text.encode(errors="replace").decode()


UNSUPPORTED = {
    "n": "a request has one answer; ask again with another seed for another",
    "best_of": "a request has one answer",
    "frequency_penalty": "penalties are not supported",
    "presence_penalty": "penalties are not supported",
    "logit_bias": "biases are not supported",
    "tools": "models of this server call no tools",
    "tool_choice": "models of this server call no tools",
    "functions": "models of this server call no functions",
    "response_format": "only text is answered",
    "modalities": "only text is answered",
    "audio": "only text is answered",
    "suffix": "text is only continued",
    "store": "answers are not kept",
    "prompt": "one text, or the token ids of one; several prompts are not supported",
}
"""Fields of OpenAI's that have one value here → why."""


def of(error: Exception) -> ApiError:
    """How an error is told to whoever asked."""
    match error:
        case ApiError():
            return error
        case Refused():
            return ApiError(400, str(error), error.field)
        case Draining():
            return ApiError(503, str(error), code="draining", retry_after=error.retry_after)
        case Busy():
            return ApiError(429, str(error), code="busy", retry_after=error.retry_after)
        case NotFinite():
            return ApiError(400, str(error), code="not_finite")
        case Failed():
            return ApiError(500, str(error), code="failed")
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            nested = isinstance(error.__cause__, RecursionError)
            return ApiError(error.status_code, "the JSON is nested too deeply" if nested else str(error.detail))
        case _:
            logger.error("a request could not be answered", exc_info=error)
            return ApiError(500, "an error of the server, which its log tells", code="failed")


def _invalid(error: RequestValidationError) -> ApiError:
    found: Mapping[str, Any] = error.errors()[0]
    place = [str(part) for part in found["loc"][1:]]  # the first one says: body, path or query
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {found['ctx']['error']} at character {place[0]}")
    reason = "there is no such field" if found["type"] == "extra_forbidden" else str(found["msg"])
    if place and place[0] in UNSUPPORTED:
        reason = f"{reason} ({UNSUPPORTED[place[0]]})"
    param = ".".join(place) or None
    return ApiError(400, f"{param or 'the body'}: {reason}", param)


def install(app: FastAPI) -> None:
    """Answer every error of `app` in this form."""

    async def told(request: Request, error: Exception) -> JSONResponse:
        return of(error).response(getattr(error, "headers", None))

    for kind in (ApiError, Refused, Busy, Failed, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, told)
