"""Submissions of the native face: an inline JSON document, or a stream of NDJSON lines with a query.

caller's bytes ──strict_json──▶ documents ──parse_request──▶ groups of `StagedLine` ──api.submission──▶ a job
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import orjson
from starlette.requests import Request

from api.deps import Services
from api.line_groups import groups_of_lines
from api.native import job_options
from api.request_body import BYTE_ORDER_MARK, LineSplitter, NumberedLine, read_body, read_whole
from api.submission import replay, reserved, store
from jobs import strict_json
from jobs.errors import InvalidInput, ModelNotFound, TooLarge
from jobs.queries import submission
from jobs.queries.reading import Job
from jobs.queries.tenants import Tenant
from jobs.requests import ModelLimits, Params, StagedLine, parse_request


async def submit_document(services: Services, tenant: Tenant, request: Request, key: str | None) -> Job:
    """Take an inline JSON submission."""
    settings = services.settings
    raw = await read_whole(request, max_bytes=settings.max_inline_bytes, timeout=settings.body_timeout)
    document, fingerprint = await asyncio.to_thread(read_document, raw, settings.max_json_depth)
    options, prompts = job_options.from_document(document)
    if len(prompts) > settings.max_lines:
        raise TooLarge(f"More than {settings.max_lines} prompts in one job.", param="prompts")
    model = await find_model(services, options.model)
    async with reserved(services, tenant, options, key) as reservation:
        if reservation is not None and not reservation.is_ours:
            return await replay(services, tenant, reservation, fingerprint)
        groups = _groups_of_prompts(prompts, options.params, model, settings.stage_chunk_lines)
        return await store(services, tenant, options, reservation, groups, lambda: fingerprint)


def read_document(raw: bytes, max_depth: int) -> tuple[object, bytes]:
    """The document, and the hash that tells it from other requests."""
    fingerprint = hashlib.sha256(b"application/json\n")
    fingerprint.update(raw)
    return strict_json.parse(raw.removeprefix(BYTE_ORDER_MARK), max_depth=max_depth), fingerprint.digest()


async def submit_lines(services: Services, tenant: Tenant, request: Request, key: str | None) -> Job:
    """Take an NDJSON upload, storing it while it still comes in."""
    settings = services.settings
    options = job_options.from_query(request.scope["query_string"], max_depth=settings.max_json_depth)
    model = await find_model(services, options.model)
    # The query is as much of the request as the body is.
    fingerprint = hashlib.sha256(
        orjson.dumps(options.model_dump(exclude_unset=True), option=orjson.OPT_SORT_KEYS) + b"\n"
    )
    pieces = read_body(request, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout)

    async def groups() -> AsyncIterator[list[StagedLine]]:
        splitter = LineSplitter(max_line_bytes=settings.max_line_bytes, max_lines=settings.max_lines)
        async for group in groups_of_lines(pieces, fingerprint.update, splitter, settings.stage_chunk_lines):
            yield await asyncio.to_thread(_parse_lines, group, options.params, model, settings.max_json_depth)

    async with reserved(services, tenant, options, key) as reservation:
        if reservation is not None and not reservation.is_ours:
            async for piece in pieces:
                fingerprint.update(piece)
            return await replay(services, tenant, reservation, fingerprint.digest())
        return await store(services, tenant, options, reservation, groups(), fingerprint.digest)


async def find_model(services: Services, name: str) -> ModelLimits:
    """The job's model. Raises `ModelNotFound`."""
    model = await services.transaction(submission.find_model, name)
    if model is None:
        raise ModelNotFound(name)
    return model


def _parse_lines(lines: list[NumberedLine], defaults: Params, model: ModelLimits, max_depth: int) -> list[StagedLine]:
    staged = []
    for line in lines:
        try:
            document = strict_json.parse(line.raw, max_depth=max_depth)
            staged.append(parse_request(document, line.number, defaults, model))
        except InvalidInput as error:
            error.line = line.number
            raise
    return staged


async def _groups_of_prompts(
    prompts: list[object], defaults: Params, model: ModelLimits, limit: int
) -> AsyncIterator[list[StagedLine]]:
    for start in range(0, len(prompts), limit):
        yield await asyncio.to_thread(_parse_prompts, prompts[start : start + limit], start, defaults, model)


def _parse_prompts(prompts: list[object], start: int, defaults: Params, model: ModelLimits) -> list[StagedLine]:
    staged = []
    for index, prompt in enumerate(prompts, start):
        try:
            staged.append(parse_request(prompt, index + 1, defaults, model))
        except InvalidInput as error:
            at = f"prompts[{index}]"
            error.param = f"{at}.{error.param}" if error.param is not None else at
            raise
    return staged
