"""What an owner does with a job beside cancelling it: retry, pause, resume, another priority or name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from api.deps import Caller, InjectedServices
from api.native.finding import find_job, note_foreign
from api.native.retries import Retry, retry
from api.openai.documents import read_document
from api.parameters import IdempotencyKey
from api.schemas import JobObject
from jobs.errors import InvalidInput, JobNotFound
from jobs.queries import changing
from jobs.requests import JobName, check_priority
from jobs.strict_model import StrictModel

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


class JobChange(StrictModel):
    """What is given changes."""

    priority: int | None = Field(default=None, ge=-100, le=100)
    name: JobName | None = None


def body_of(schema: type[BaseModel], *, required: bool) -> dict[str, Any]:
    """What OpenAPI cannot learn from a function that reads the body itself. What it refers to is in `jobs.SCHEMAS`."""
    document = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    document.pop("$defs", None)
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": document}}}}


@router.post("/{job_id}/retry", status_code=202, openapi_extra=body_of(Retry, required=False))
async def retry_job(
    job_id: str,
    request: Request,
    response: Response,
    caller: Caller,
    services: InjectedServices,
    idempotency_key: IdempotencyKey = None,
) -> JobObject:
    """Run lines of a job again, as a new job whose `retry_of` names it. Its own lines stay as they ended.

    Without a choice of lines all that have no answer run again. `params` replace those of each line.
    """
    parent = await find_job(services, caller, job_id)
    wanted, _ = await read_document(services, request, Retry)
    answer = JobObject.of(await retry(services, caller, parent, wanted, idempotency_key))
    note_foreign(caller, parent.tenant_id, parent.id, "retried")
    response.headers["location"] = f"/v1/jobs/{answer.id}"
    return answer


@router.post("/{job_id}/pause")
async def pause_job(job_id: str, caller: Caller, services: InjectedServices) -> JobObject:
    """Start no further line of a job. Lines that run end as usual, and its completion window goes on."""
    job = await find_job(services, caller, job_id)
    if not await services.transaction(changing.pause, job.tenant_id, job.id, by=caller.actor):
        raise JobNotFound(job_id)
    note_foreign(caller, job.tenant_id, job.id, "paused")
    return JobObject.of(await find_job(services, caller, job_id))


@router.post("/{job_id}/resume")
async def resume_job(job_id: str, caller: Caller, services: InjectedServices) -> JobObject:
    """Go on with a job that was paused."""
    job = await find_job(services, caller, job_id)
    if not await services.transaction(changing.resume, job.tenant_id, job.id, by=caller.actor):
        raise JobNotFound(job_id)
    note_foreign(caller, job.tenant_id, job.id, "resumed")
    services.notifier.notify(job.model, job.id)
    return JobObject.of(await find_job(services, caller, job_id))


@router.patch("/{job_id}", openapi_extra=body_of(JobChange, required=True))
async def change_job(job_id: str, request: Request, caller: Caller, services: InjectedServices) -> JobObject:
    """Give a job another priority, which the next claim goes by, or another name."""
    job = await find_job(services, caller, job_id)
    wanted, _ = await read_document(services, request, JobChange)
    if wanted.priority is None and wanted.name is None:
        raise InvalidInput("'priority' or 'name' is needed")
    if wanted.priority is not None:
        check_priority(wanted.priority, services.settings.max_priority)
    if not await services.transaction(
        changing.change, job.tenant_id, job.id, priority=wanted.priority, name=wanted.name, by=caller.actor
    ):
        raise JobNotFound(job_id)
    note_foreign(caller, job.tenant_id, job.id, "changed")
    return JobObject.of(await find_job(services, caller, job_id))
