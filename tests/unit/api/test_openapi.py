"""`/openapi.json` refers to nothing that it does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from api.app import create_app
from jobs.settings import Settings


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def test_document_holds_all_that_it_refers_to() -> None:
    document = create_app(Settings(database_url="postgresql://x", redis_url="redis://x")).openapi()
    held = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    references = set(_references(document))
    assert len(references) > 10
    assert references <= held
