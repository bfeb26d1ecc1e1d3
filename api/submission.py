"""How a batch is stored, whichever face it came through.

    reserve the Idempotency-Key → stage in groups, each its own short transaction → publish with one guarded UPDATE →
    notify the model's workers

Nothing is visible before it is published; a failure before that abandons the job and frees its key. A key whose upload
died without saying so is taken over by the next request that has it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from uuid import UUID

from sqlalchemy import Connection

from api.deps import Services
from jobs.errors import IdempotencyBusy, IdempotencyMismatch, InvalidInput, JobNotFound, SubmissionCollected
from jobs.ids import JOB_PREFIX, new_id, public_id
from jobs.queries import reading, submission
from jobs.queries.reading import Job
from jobs.queries.submission import Reservation
from jobs.queries.tenants import Tenant
from jobs.requests import JobOptions, StagedLine, check_priority

logger = logging.getLogger(__name__)

KEY_POLL = 0.1  # seconds between two looks at a key that another request holds
# Seconds without the upload's lock. A process whose session Postgres ended takes its locks again in a tenth of this.
DEAD_AFTER = 2.0


@asynccontextmanager
async def reserved(
    services: Services, tenant: Tenant, options: JobOptions, key: str | None
) -> AsyncGenerator[Reservation | None]:
    """What the key stands for, if there is one. If it is ours, it counts as alive until the block ends."""
    check_priority(options.priority, services.settings.max_priority)
    if key is None:
        yield None
        return
    job_id = new_id()
    # Locked before the reservation is visible to other requests.
    async with services.upload_locks.lock(job_id):
        yield await _reserve(services, tenant, options, key, job_id)


async def _reserve(services: Services, tenant: Tenant, options: JobOptions, key: str, job_id: UUID) -> Reservation:
    """Open a job, or find the published one that has the key. Waits while another request uploads under the key."""
    patience = time.monotonic() + services.settings.max_wait
    while True:
        reservation = await services.transaction(_open, tenant.id, options, key, job_id)
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


def _open(connection: Connection, tenant_id: UUID, options: JobOptions, key: str, job_id: UUID) -> Reservation:
    with connection.begin_nested() as savepoint:
        submission.open_job(connection, tenant_id, options, job_id)
        reservation = submission.reserve(connection, tenant_id, key, job_id)
        if not reservation.is_ours:
            savepoint.rollback()
        return reservation


async def replay(services: Services, tenant: Tenant, reservation: Reservation, fingerprint: bytes) -> Job:
    if reservation.body_sha256 != fingerprint:
        raise IdempotencyMismatch
    job = await services.transaction(reading.get_job, tenant.id, reservation.job_id)
    if job is None:
        raise JobNotFound(public_id(JOB_PREFIX, reservation.job_id))
    return job


async def store(
    services: Services,
    tenant: Tenant,
    options: JobOptions,
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
                    job_id = await services.transaction(_open_with, tenant.id, options, group)
                elif not await services.transaction(submission.stage_lines, job_id, group):
                    raise SubmissionCollected
                is_empty = False
        if is_empty or job_id is None:
            raise InvalidInput("The body has no lines: a job needs at least one prompt.")
        sha256 = None if reservation is None else fingerprint()
        job = await services.transaction(_publish, tenant.id, job_id, sha256)
    except BaseException:  # cancelled, too
        if job_id is not None:
            await asyncio.shield(services.quietly(submission.abandon, job_id))
        raise
    services.notifier.notify(options.model, job_id)
    return job


def _open_with(connection: Connection, tenant_id: UUID, options: JobOptions, group: list[StagedLine]) -> UUID:
    job_id = submission.open_job(connection, tenant_id, options)
    submission.stage_lines(connection, job_id, group)
    return job_id


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
