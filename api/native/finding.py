"""The caller's job of an id in an address; another tenant's is unknown."""

from __future__ import annotations

from uuid import UUID

from api.deps import Services
from jobs.errors import JobNotFound
from jobs.ids import JOB_PREFIX, parse_id
from jobs.queries.reading import Job
from jobs.queries.tenants import Tenant


def parse_job_id(job_id: str) -> UUID:
    """Raises `JobNotFound` for what is no id of a job."""
    identity = parse_id(JOB_PREFIX, job_id)
    if identity is None:
        raise JobNotFound(job_id[:100])
    return identity


async def find_job(services: Services, caller: Tenant, job_id: str) -> Job:
    """The caller's published job. Raises `JobNotFound`."""
    job = await services.jobs.get((caller.id, parse_job_id(job_id)))
    if job is None:
        raise JobNotFound(job_id)
    return job
