"""`/openapi.json` refers to nothing that it does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from api.app import create_app
from api.openai.lines import ENDPOINTS, Endpoint, read_request
from jobs.errors import InvalidInput
from jobs.requests import ModelLimits
from jobs.settings import Settings

OF_THE_LANE = {"background", "model", "stream", "stream_options"}
"""Fields that are read before the translations."""


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings(database_url="postgresql://x", redis_url="redis://x")).openapi()


def test_document_holds_all_that_it_refers_to(document: dict[str, Any]) -> None:
    held = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    references = set(_references(document))
    assert len(references) > 10
    assert references <= held


def is_known(endpoint: Endpoint, field: str) -> bool:
    least = {"input": "a"} if endpoint == "/v1/responses" else {"prompt": "a", "messages": [{"role": "user"}]}
    least.pop("messages" if endpoint == "/v1/completions" else "prompt", None)
    try:
        read_request({**least, field: 1}, endpoint, 1, ModelLimits("demo", max_model_len=128, vocab_size=100))
    except InvalidInput as error:
        return not (error.param == field and error.message.startswith("no such field"))
    return True


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_fields_of_a_live_request_are_those_that_are_taken(document: dict[str, Any], endpoint: Endpoint) -> None:
    body = document["paths"][endpoint]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert [name for name in body["properties"].keys() - OF_THE_LANE if not is_known(endpoint, name)] == []
    assert not is_known(endpoint, "nonsense")
    assert is_known(endpoint, "temperature")
    assert "temperature" in body["properties"]


def test_only_commands_that_take_nothing_document_no_body(document: dict[str, Any]) -> None:
    commands = {
        path.rpartition("/")[2]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method in ("post", "patch") and "requestBody" not in operation
    }
    assert commands == {"cancel", "drain", "finalize", "pause", "replay", "resume", "stop", "undrain"}
