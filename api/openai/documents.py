"""JSON bodies of OpenAI's face: the one strict parser, then a model of pydantic's."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from api.deps import Services
from api.request_body import read_whole
from jobs import strict_json
from jobs.errors import InvalidInput
from jobs.requests import validate

Document = TypeVar("Document", bound=BaseModel)


async def read_object(services: Services, request: Request) -> tuple[dict[str, Any], bytes]:
    """The body as a JSON object, and its SHA-256. An empty one is an empty object. Raises `InvalidInput`."""
    settings = services.settings
    raw = await read_whole(request, max_bytes=settings.max_inline_bytes, timeout=settings.body_timeout)
    document = await asyncio.to_thread(strict_json.parse, raw or b"{}", max_depth=settings.max_json_depth)
    if not isinstance(document, dict):
        raise InvalidInput("a JSON object is expected here")
    return document, hashlib.sha256(raw).digest()


async def read_document(services: Services, request: Request, schema: type[Document]) -> tuple[Document, bytes]:
    """The body as a `schema`, and its SHA-256. Raises `InvalidInput` that names the field."""
    document, sha256 = await read_object(services, request)
    return validate(schema, document), sha256


def json_body(schema: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI cannot learn from a function that reads the body as a stream. It refers to what answers hold."""
    document = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    document.pop("$defs", None)
    return {"requestBody": {"content": {"application/json": {"schema": document}}}}
