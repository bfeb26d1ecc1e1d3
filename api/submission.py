"""A batch comes in.

    reserve the Idempotency-Key → stage in groups, each its own short transaction → publish with one guarded UPDATE →
    ring the bell

Nothing of it is visible before it is published; whatever goes wrong before that abandons it and frees its key. A key
whose upload died without being able to say so is taken over by the next request that has it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from uuid import UUID

import orjson
import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request

from api import job_options as heads
from api.deps import Services
from api.request_body import LineSplitter, NumberedLine, read_body, read_whole
from jobs import strict_json
from jobs.errors import (
    IdempotencyBusy,
    IdempotencyMismatch,
    InvalidInput,
    JobNotFound,
    ModelNotFound,
    SubmissionCollected,
    TooLarge,
)
from jobs.ids import JOB_PREFIX, new_id, public_id
from jobs.queries import reading, submission
from jobs.queries.reading import Job
from jobs.queries.submission import Reservation
from jobs.queries.tenants import Tenant
from jobs.requests import JobOptions, ModelLimits, Params, StagedLine, parse_request

logger = logging.getLogger(__name__)

GROUP_BYTES = 4 * 1024 * 1024  # of raw lines: a group of long lines is cut short, so that memory stays flat
GROUP_SECONDS = 1.0  # a slow upload is checked and stored at least this often
KEY_POLL = 0.1  # seconds between two looks at a key that another request holds
# Seconds without the upload's lock. A process whose session Postgres ended takes its locks again in a tenth of this.
DEAD_AFTER = 2.0


async def submit_document(services: Services, tenant: Tenant, request: Request, key: str | None) -> Job:
    """Take an inline JSON submission."""
    settings = services.settings
    raw = await read_whole(request, max_bytes=settings.max_inline_bytes, timeout=settings.body_timeout)
    document = await asyncio.to_thread(strict_json.parse, raw, max_depth=settings.max_json_depth)
    head, prompts = heads.from_document(document)
    if len(prompts) > settings.max_lines:
        raise TooLarge(f"More than {settings.max_lines} prompts in one job.", param="prompts")
    model = await _find_model(services, head)
    fingerprint = hashlib.sha256(b"application/json\n" + raw)
    async with _reserved(services, tenant, head, key) as reservation:
        if reservation is not None and not reservation.is_ours:
            return await _replay(services, tenant, reservation, fingerprint.digest())
        groups = _groups_of_prompts(prompts, head.params, model, settings.stage_chunk_lines)
        return await _store(services, tenant, head, reservation, groups, fingerprint.digest)


async def submit_lines(services: Services, tenant: Tenant, request: Request, key: str | None) -> Job:
    """Take an NDJSON upload, storing it while it still comes in."""
    settings = services.settings
    head = heads.from_query(request.scope["query_string"], max_depth=settings.max_json_depth)
    model = await _find_model(services, head)
    # The query is as much of the request as the body is.
    fingerprint = hashlib.sha256(orjson.dumps(head.model_dump(exclude_unset=True), option=orjson.OPT_SORT_KEYS) + b"\n")
    pieces = read_body(request, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout)

    async def groups() -> AsyncIterator[list[StagedLine]]:
        splitter = LineSplitter(max_line_bytes=settings.max_line_bytes, max_lines=settings.max_lines)
        async for group in _groups_of_lines(pieces, fingerprint.update, splitter, settings.stage_chunk_lines):
            yield await asyncio.to_thread(_parse_lines, group, head.params, model, settings.max_json_depth)

    async with _reserved(services, tenant, head, key) as reservation:
        if reservation is not None and not reservation.is_ours:
            async for piece in pieces:
                fingerprint.update(piece)
            return await _replay(services, tenant, reservation, fingerprint.digest())
        return await _store(services, tenant, head, reservation, groups(), fingerprint.digest)


async def _find_model(services: Services, head: JobOptions) -> ModelLimits:
    model = await services.transaction(submission.find_model, head.model)
    if model is None:
        raise ModelNotFound(head.model)
    return model


@asynccontextmanager
async def _reserved(
    services: Services, tenant: Tenant, head: JobOptions, key: str | None
) -> AsyncGenerator[Reservation | None]:
    """What the key stands for, if there is one. If it is ours, it counts as alive until the block ends."""
    if key is None:
        yield None
        return
    job_id = new_id()
    # Locked before anybody can see the reservation.
    async with services.uploads.lock(job_id):
        yield await _reserve(services, tenant, head, key, job_id)


async def _reserve(services: Services, tenant: Tenant, head: JobOptions, key: str, job_id: UUID) -> Reservation:
    """Open a job, or find the published one that has the key. Waits while another request uploads under the key."""
    patience = time.monotonic() + services.settings.max_wait
    while True:
        reservation = await services.transaction(_open, tenant.id, head, key, job_id)
        alive = time.monotonic()
        while not reservation.is_ours and reservation.body_sha256 is None:
            now = time.monotonic()
            if not reservation.is_orphaned:
                alive = now
            elif now - alive > DEAD_AFTER:
                await services.transaction(submission.free_orphaned, tenant.id, key)
                break
            if now > patience and not reservation.is_orphaned:
                raise IdempotencyBusy
            await asyncio.sleep(KEY_POLL)
            found = await services.transaction(submission.find_reservation, tenant.id, key)
            if found is None:
                break  # abandoned: the key is free again
            reservation = found
        else:
            return reservation


def _open(connection: Connection, tenant_id: UUID, head: JobOptions, key: str, job_id: UUID) -> Reservation:
    with connection.begin_nested() as savepoint:
        submission.open_job(connection, tenant_id, head, job_id)
        reservation = submission.reserve(connection, tenant_id, key, job_id)
        if not reservation.is_ours:
            savepoint.rollback()
        return reservation


async def _replay(services: Services, tenant: Tenant, reservation: Reservation, fingerprint: bytes) -> Job:
    if reservation.body_sha256 != fingerprint:
        raise IdempotencyMismatch
    job = await services.transaction(reading.get_job, tenant.id, reservation.job_id)
    if job is None:
        raise JobNotFound(public_id(JOB_PREFIX, reservation.job_id))
    return job


async def _store(
    services: Services,
    tenant: Tenant,
    head: JobOptions,
    reservation: Reservation | None,
    groups: AsyncIterator[list[StagedLine]],
    fingerprint: Callable[[], bytes],
) -> Job:
    """Stage every group, then publish. `fingerprint` is asked when the body has been read.

    Without a reservation the job is opened with its first group, so that a body whose beginning is wrong leaves no row.
    """
    job_id = None if reservation is None else reservation.job_id
    is_empty = True
    try:
        async with aclosing(_one_ahead(groups)) as ready:
            async for group in ready:
                if job_id is None:
                    job_id = await services.transaction(_open_with, tenant.id, head, group)
                elif not await services.transaction(submission.stage_lines, job_id, group):
                    raise SubmissionCollected
                is_empty = False
        if is_empty or job_id is None:
            raise InvalidInput("The body has no lines: a job needs at least one prompt.")
        sha256 = None if reservation is None else fingerprint()
        job = await services.transaction(_publish, tenant.id, job_id, sha256)
    except BaseException:  # cancelled, too
        if job_id is not None:
            await asyncio.shield(_abandon(services, job_id))
        raise
    services.bell.ring(head.model, job_id)
    return job


def _open_with(connection: Connection, tenant_id: UUID, head: JobOptions, group: list[StagedLine]) -> UUID:
    job_id = submission.open_job(connection, tenant_id, head)
    submission.stage_lines(connection, job_id, group)
    return job_id


async def _abandon(services: Services, job_id: UUID) -> None:
    try:
        await services.transaction(submission.abandon, job_id)
    except (SQLAlchemyError, psycopg.Error) as error:
        # The caller hears of the first failure, not of this one; the courier collects the job.
        logger.warning("Cannot abandon %s now: %s", public_id(JOB_PREFIX, job_id), type(error).__name__)


def _publish(connection: Connection, tenant_id: UUID, job_id: UUID, body_sha256: bytes | None) -> Job:
    if not submission.publish(connection, job_id, body_sha256=body_sha256):
        raise SubmissionCollected
    job = reading.get_job(connection, tenant_id, job_id)
    assert job is not None
    return job


async def _one_ahead(groups: AsyncIterator[list[StagedLine]]) -> AsyncGenerator[list[StagedLine]]:
    """Receive and check the next group while Postgres stores this one."""

    async def advance() -> list[StagedLine] | None:
        return await anext(groups, None)

    coming = asyncio.create_task(advance())
    try:
        while (group := await coming) is not None:
            coming = asyncio.create_task(advance())
            yield group
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


async def _groups_of_lines(
    pieces: AsyncIterator[bytes], note: Callable[[bytes], None], splitter: LineSplitter, limit: int
) -> AsyncIterator[list[NumberedLine]]:
    """Lines in groups of at most `limit`. `note` sees every piece of the body."""
    group: list[NumberedLine] = []
    size = 0
    began = time.monotonic()
    try:
        async for piece in pieces:
            note(piece)
            for line in splitter.feed(piece):
                group.append(line)
                size += len(line.raw)
                if len(group) >= limit or size >= GROUP_BYTES or time.monotonic() - began >= GROUP_SECONDS:
                    yield group
                    group, size, began = [], 0, time.monotonic()
        group.extend(splitter.close())
    except TooLarge:
        # What came before it may be wrong too, and then that is what the caller hears of.
        if group:
            yield group
        raise
    if group:
        yield group


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
