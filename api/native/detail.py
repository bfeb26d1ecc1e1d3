"""`GET /v1/jobs/{id}`: how far a job is, when it ends, why it waits; with `include`, all that its page shows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy import Connection

from api.deps import Caller, InjectedServices
from api.native import views
from api.native.finding import find_job
from api.native.open_jobs import find_open_or_published
from api.native.views import JobDetail
from api.schemas import job_fields
from jobs.errors import JobNotFound
from jobs.estimates import percent
from jobs.queries import lines, progress
from jobs.queries.explaining import ModelQueue
from jobs.queries.lines import Filter
from jobs.queries.reading import Job

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

PARTS = ("progress", "failures", "timeline", "deliveries", "results")
RESULTS = 50
PREVIEW = 200


_NOTHING_RUNS: dict[str, object] = {
    "percent": 0.0,
    "running": 0,
    "lines_per_second": 0.0,
    "eta": None,
    "wait": None,
    "held_back": None,
}


class JobQuery(BaseModel):
    """A misspelt parameter is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    wait: float = Field(
        default=0,
        ge=0,
        allow_inf_nan=False,
        description="seconds to wait for the job's end; the server cuts it at PAGEMILL_MAX_WAIT, 60 unless set",
    )
    include: list[str] = Field(default=[], max_length=10, description=f"{', '.join(PARTS)}; separated by commas")

    @field_validator("include")
    @classmethod
    def _known_parts(cls, parts: list[str]) -> list[str]:
        named = [part for entry in parts for part in entry.split(",")]
        for part in named:
            if part not in PARTS:
                raise ValueError(f"{part[:40]!r} is none of {', '.join(PARTS)}")
        return named


@router.get("/{job_id}", response_model_exclude_unset=True)
async def get_job(
    job_id: str, caller: Caller, services: InjectedServices, query: Annotated[JobQuery, Query()]
) -> JobDetail:
    """A job as it stands; with `wait`, as it stands at its end or when the wait is over."""
    try:
        job = await find_job(services, caller, job_id)
    except JobNotFound:
        # It may still take lines; nothing of it runs, and there is nothing to wait for.
        found = await find_open_or_published(services, caller, job_id)
        return JobDetail.model_validate(found.model_dump() | _NOTHING_RUNS)
    if query.wait > 0 and not job.is_terminal:
        await services.job_watch.wait(job.id, min(query.wait, services.settings.max_wait))
        job = await find_job(services, caller, job_id)
    if job.is_terminal and not query.include:
        return JobDetail.model_validate(_summary(job))  # so that the end of a job does not cost a look for each poll
    queue = None if job.is_terminal else await services.queues.get(job.model)
    return await services.transaction(read_detail, job, queue, query.include)


def read_detail(connection: Connection, job: Job, queue: ModelQueue | None, include: Collection[str]) -> JobDetail:
    """All of an answer, in a transaction. `queue` is None where the job is at its end."""
    detail = _summary(job)
    if queue is not None:
        pace = progress.read_pace(connection, job, queue.now)
        detail |= views.standing(job, queue, pace)
        detail["lines_per_second"] = round(pace.lines_per_second, 3)
    if "progress" in include:
        detail["progress"] = [views.point_object(point) for point in progress.read_points(connection, job.id)]
    if "failures" in include:
        detail["failures"] = [views.failure_object(group) for group in progress.read_failures(connection, job.id)]
    if "timeline" in include:
        detail["timeline"] = views.timeline(job, progress.read_events(connection, job.id))
    if "deliveries" in include:
        detail["deliveries"] = [views.delivery_object(one) for one in progress.read_deliveries(connection, job.id)]
    if "results" in include:
        newest, _ = lines.read_chunk(
            connection,
            job.id,
            Filter(),
            at=job.last_seq + 1,
            last_seq=job.last_seq,
            is_forward=False,
            limit=RESULTS,
        )
        detail["results"] = [views.result_summary(result, PREVIEW) for result in newest]
    return JobDetail.model_validate(detail)


def _summary(job: Job) -> dict[str, object]:
    """What is known without a look: the job, of which nothing runs."""
    return job_fields(job) | {
        **_NOTHING_RUNS,
        "percent": percent(job.last_seq, job.total, is_ended=job.is_terminal),
    }
