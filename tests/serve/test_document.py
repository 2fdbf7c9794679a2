"""The OpenAPI document is true: schemathesis asks what it allows, and what it doesn't, and reads the answers by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from distilvlm.serve.server import Server

from .fake_engine import FakeEngine
from .running import ask, serving

DEPENDENT = "positive_data_acceptance"
"""Not asked for: fields that depend on each other, and strings that are no picture, a schema can't tell."""


OPERATIONS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/files",
    "GET /v1/files/{file_id}",
    "DELETE /v1/files/{file_id}",
    "GET /health",
    "GET /metrics",
)
FREE = ("/v1/models", "/v1/models/{name}", "/v1/files/{file_id}", "/health", "/metrics")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(FakeEngine(places=10**6)) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_answers_are_as_the_document_says(document: Any, operation: str, mode: GenerationMode) -> None:
    method, path = operation.split()
    if mode is GenerationMode.NEGATIVE and path in FREE:
        pytest.skip("there is nothing in it, or any text, so it can't be of another form")

    @hypothesis.settings(
        max_examples=20,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=document[path][method].as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        case.call_and_validate(excluded_checks=[CHECKS.get_one(DEPENDENT)])

    holds()


def test_it_names_the_models_that_are_served(server: Server) -> None:
    document = ask(server, "GET", "/openapi.json")[2]
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["parrot", "parrot-text"]
    described = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert described == set(OPERATIONS)
