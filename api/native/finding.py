"""The caller's job of an id in an address. Another tenant's is unknown, unless the caller runs the service."""

from __future__ import annotations

import logging
from uuid import UUID

from api.deps import Services
from jobs.errors import JobNotFound
from jobs.ids import JOB_PREFIX, parse_id, public_id
from jobs.queries import reading
from jobs.queries.reading import Job
from jobs.queries.tenants import Principal

logger = logging.getLogger(__name__)


def parse_job_id(job_id: str) -> UUID:
    """Raises `JobNotFound` for what is no id of a job."""
    identity = parse_id(JOB_PREFIX, job_id)
    if identity is None:
        raise JobNotFound(job_id[:100])
    return identity


async def find_job(services: Services, caller: Principal, job_id: str) -> Job:
    """The published job, if the caller sees it. Raises `JobNotFound`."""
    identity = parse_job_id(job_id)
    owner = caller.scope
    if owner is None:
        owner = await services.transaction(reading.owner_of, identity)
    job = None if owner is None else await services.jobs.get((owner, identity))
    if job is None:
        raise JobNotFound(job_id)
    return job


def note_foreign(caller: Principal, tenant_id: UUID, job_id: UUID, action: str) -> None:
    """Log what an operator did with another tenant's job, and with which key; nothing for the job's owner."""
    if caller.actor.is_foreign_to(tenant_id):
        logger.warning(
            "operator of %r, key %s (%s): %s %s of tenant %s",
            caller.name,
            caller.key_hint,
            caller.key_id,
            action,
            public_id(JOB_PREFIX, job_id),
            tenant_id,
        )
