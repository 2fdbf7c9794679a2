"""The server as an ASGI application: OpenAI's API, health, metrics, and the chat page.

    POST /v1/chat/completions, /v1/completions     completions.py
    GET  /v1/models, /v1/models/NAME
    POST, GET, DELETE /v1/files                    files.py
    GET  /health, /metrics, /openapi.json
    GET  /                                         page_files.py

Everything passes `guard.py` first. Errors have one form, `errors.py`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from . import completions, errors, files, page_files
from .desk import Desk
from .guard import Guard
from .interface import Engine, ServedModel
from .metrics import CONTENT_TYPE
from .protocol import Health, ModelBody, ModelList
from .settings import Settings

VERSION = importlib.metadata.version("distilvlm")


def application(engines: Sequence[Engine], settings: Settings | None = None) -> FastAPI:
    """A server of engines; `app.state.desk` is what its routes share.

    Raises:
        ValueError: two models of one name.
    """
    settings = settings or Settings()
    desk = Desk(engines, settings)
    page = page_files.page_files()
    app = FastAPI(
        title="distilvlm",
        version=VERSION,
        description="Vision-language models behind OpenAI's API.",
        docs_url=None,  # pages of FastAPI's that load scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": errors.ErrorBody}, "5XX": {"model": errors.ErrorBody}},
        separate_input_output_schemas=False,
    )
    app.state.desk = desk
    errors.install(app)
    app.include_router(completions.routes(desk))
    app.include_router(files.routes(desk))
    _add_about(app, desk)
    app.include_router(page_files.routes(page))
    open_paths = frozenset(("/health", *(file.path for file in page)))
    app.add_middleware(Guard, settings=settings, open_paths=open_paths, answered=desk.metrics.response)
    if settings.origins:  # outermost, since a preflight carries no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.openapi = lambda: _document(app, desk, open_paths)
    return app


def _add_about(app: FastAPI, desk: Desk) -> None:
    def body(model: ServedModel) -> ModelBody:
        facts = {name: getattr(model, name) for name in ("sees", "boxes", "context", "parameters", "geometry")}
        return ModelBody(id=model.name, created=desk.started, owned_by="distilvlm", **facts)

    @app.get("/v1/models", tags=["models"])
    async def models() -> ModelList:
        """Whom a request may name."""
        return ModelList(data=[body(model) for model in desk.models.values()])

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def model(name: str) -> ModelBody:
        """One of them."""
        return body(desk.model(name))

    @app.get("/health", response_model=Health, responses={503: {"model": Health}}, tags=["server"])
    async def health() -> Any:
        """Whether requests are taken; 503 as soon as the server is about to stop."""
        status = "draining" if desk.draining else "ok"
        return JSONResponse({"status": status}, 503 if desk.draining else 200)

    @app.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        tags=["server"],
        response_class=Response,
    )
    async def metrics() -> Response:
        """Prometheus."""
        return Response(desk.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _document(app: FastAPI, desk: Desk, open_paths: frozenset[str]) -> dict[str, Any]:
    """The OpenAPI document, with what only this server knows: its models, and whether it wants a key."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for name in ("ChatRequest", "TextRequest"):
            made["components"]["schemas"][name]["properties"]["model"]["enum"] = [*desk.models]
        if desk.settings.key is not None:
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in made["paths"].items():
                for operation in operations.values():
                    operation["security"] = [] if path in open_paths else [{"key": []}]
        app.openapi_schema = made
    return app.openapi_schema
