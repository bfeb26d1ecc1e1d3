"""`/v1/jobs`: hand in, list, cancel, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection

from api.deps import Caller, InjectedServices, Services
from api.errors import UnsupportedMediaType
from api.native import dry_runs, submissions
from api.native.dry_runs import DryRun
from api.native.finding import find_job, note_foreign, parse_job_id
from api.native.views import JobList, JobRow, job_rows
from api.parameters import IdempotencyKey
from api.schemas import JobDeleted, JobObject
from api.tokenizer_calls import InjectedCalls
from jobs import search
from jobs.errors import InvalidInput, JobNotDeletable
from jobs.ids import JOB_PREFIX, parse_id, public_id
from jobs.queries import open_jobs, progress, retention, searching, settling, tenants
from jobs.queries.audit import Actor
from jobs.queries.explaining import ModelQueue
from jobs.queries.reading import Job
from jobs.queries.tenants import Principal
from jobs.requests import JobOptions, Params, PromptLine
from jobs.search import Term, Value
from jobs.states import JobState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

NDJSON = "application/x-ndjson"
JSON = "application/json"

SAVED = {
    "all": "",
    "open": "status:open",
    "waiting": "status:waiting",
    "with_failures": "failed:>0",
    "at_risk": "deadline:risk",
    "ended": "-status:open",
}


class _Query(BaseModel):
    """A misspelt parameter is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")


class ListQuery(_Query):
    after: str | None = Field(default=None, description="`last_id` of the page before")
    limit: int = Field(default=20, ge=1, le=100)
    status: list[JobState] | None = Field(default=None, description="may stand several times")
    q: str = Field(default="", max_length=2000, description="a search, as `status:waiting model:a,b lines:>10k`")


class CountQuery(_Query):
    q: str = Field(default="", max_length=2000, description="a search, whose matches are counted, too")


class JobCounts(BaseModel):
    """Jobs by the searches that a page offers. Each count ends at 10,000; `capped` says that one did."""

    object: Literal["job_counts"] = "job_counts"
    all: int
    open: int
    waiting: int
    with_failures: int
    at_risk: int = Field(description="open, with a deadline within the hour")
    ended: int
    matching: int
    capped: bool


class InlineJob(JobOptions):
    """An inline submission."""

    prompts: Annotated[list[Annotated[str, Field(min_length=1)] | PromptLine], Field(min_length=1)]


_INLINE = InlineJob.model_json_schema(ref_template="#/components/schemas/{model}")
SCHEMAS: dict[str, Any] = _INLINE["$defs"]  # that the body of a submission refers to

_OBJECTS = frozenset({"metadata", "response_format", "structured_outputs"})


def _submission_schema() -> dict[str, Any]:
    """What OpenAPI cannot learn from a function that reads the body as a stream."""
    inline = {name: value for name, value in _INLINE.items() if name != "$defs"}
    fields = {
        name: {"type": "object"} if "$ref" in str(schema) else schema
        for name, schema in Params.model_json_schema()["properties"].items()
    } | {
        name: schema
        for name, schema in JobOptions.model_json_schema()["properties"].items()
        if "$ref" not in str(schema)
    }
    fields |= {"webhook_url": {"type": "string"}, "webhook_events": {"type": "array", "items": {"type": "string"}}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": inline},
                NDJSON: {
                    "schema": {
                        "type": "string",
                        "description": "One object a line: custom_id, prompt or messages, and parameters of its own.",
                    }
                },
            },
        },
        "parameters": [
            {
                "in": "query",
                "name": name,
                "schema": schema,
                "description": "for application/x-ndjson" + (" (a JSON object)" if name in _OBJECTS else ""),
            }
            for name, schema in sorted(fields.items())
        ],
    }


@router.post(
    "",
    status_code=202,
    response_model=JobObject,
    responses={200: {"model": DryRun, "description": "What a dry run found."}},
    openapi_extra=_submission_schema(),
)
async def submit(
    request: Request,
    response: Response,
    caller: Caller,
    services: InjectedServices,
    calls: InjectedCalls,
    idempotency_key: IdempotencyKey = None,
    dry_run: Annotated[bool, Query(description="store nothing, and say what would come of it")] = False,
) -> JobObject | Response:
    """Hand in a batch: inline as `application/json`, or as a stream of lines with `application/x-ndjson`.

    The answer comes when every line is stored. With an `Idempotency-Key` the same request can be sent again safely.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == JSON and not request.query_params.keys() <= {"dry_run"}:
        raise InvalidInput("An inline submission carries everything in its body and takes no query but dry_run.")
    if dry_run and media_type in (JSON, NDJSON):
        look = dry_runs.look_at_document if media_type == JSON else dry_runs.look_at_lines
        found = await look(services, calls, request)
        return Response(found.model_dump_json(), media_type=JSON)
    if media_type == JSON:
        job = await submissions.submit_document(services, caller, request, idempotency_key)
    elif media_type == NDJSON:
        job = await submissions.submit_lines(services, caller, request, idempotency_key)
    else:
        raise UnsupportedMediaType(f"The Content-Type is {media_type[:100]!r}; send {JSON} or {NDJSON}.")
    answer = JobObject.of(job)
    response.headers["location"] = f"/v1/jobs/{answer.id}"
    return answer


@router.get("")
async def list_jobs(caller: Caller, services: InjectedServices, query: Annotated[ListQuery, Query()]) -> JobList:
    """Your jobs, newest first; an operator's key lists those of all tenants. `q` searches."""
    after = None
    if query.after is not None and (after := parse_id(JOB_PREFIX, query.after)) is None:
        raise InvalidInput("not a job's id", param="after")
    terms = search.parse(query.q)
    if query.status:
        terms.append(Term("status", tuple(Value(state) for state in query.status)))
    found = await services.transaction(searching.search_jobs, caller.scope, terms, after=after, limit=query.limit + 1)
    page = await read_rows(services, found[: query.limit])
    return JobList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(found) > query.limit,
    )


async def read_rows(services: Services, jobs: Sequence[Job]) -> list[JobRow]:
    """Rows of jobs, with what only open ones have: a look for each model, and two for all of them."""
    if not jobs:
        return []
    opened = [job for job in jobs if not job.is_terminal]
    found = await asyncio.gather(*map(services.queues.get, {job.model for job in opened}))
    queues = {queue.model: queue for queue in found if queue is not None}
    return await services.transaction(_rows, jobs, opened, queues)


def _rows(
    connection: Connection, jobs: Sequence[Job], opened: Sequence[Job], queues: Mapping[str, ModelQueue]
) -> list[JobRow]:
    names = tenants.names(connection, [job.tenant_id for job in jobs])
    paces = {}
    if opened:
        paces = progress.read_paces(connection, opened, max(queue.now for queue in queues.values()))
    return job_rows(jobs, names, queues, paces)


@router.get("/counts")
async def count_jobs(caller: Caller, services: InjectedServices, query: Annotated[CountQuery, Query()]) -> JobCounts:
    """How many of your jobs are open, wait, have failures, are at risk, have ended, and match `q`."""
    searches = {name: search.parse(terms) for name, terms in (SAVED | {"matching": query.q}).items()}
    counts = await services.transaction(searching.count_jobs, caller.scope, searches)
    return JobCounts.model_validate(counts | {"capped": max(counts.values()) >= searching.MOST_COUNTED})


@router.post("/{job_id}/cancel")
async def cancel(job_id: str, caller: Caller, services: InjectedServices) -> JobObject:
    """Stop a job. What is finished is kept; a job at its end stays as it is. An operator's key stops any tenant's."""
    job = await find_job(services, caller, job_id)
    await cancel_one(services, caller, job.tenant_id, job.id)
    return JobObject.of(await find_job(services, caller, job_id))


@router.delete("/{job_id}")
async def delete(job_id: str, caller: Caller, services: InjectedServices) -> JobDeleted:
    """Forget a job that is at its end, with its prompts and results. An operator's key forgets any tenant's.

    A job that still takes lines is forgotten, too.
    """
    if await services.transaction(open_jobs.give_up, caller.id, parse_job_id(job_id), by=caller.actor):
        return JobDeleted(id=job_id)
    job = await find_job(services, caller, job_id)
    await delete_one(services, caller, job.tenant_id, job.id)
    return JobDeleted(id=job_id)


async def cancel_one(
    services: Services, caller: Principal, tenant_id: UUID, job_id: UUID, *, by: Actor | None = None
) -> None:
    """Stop a job of this tenant."""
    state = await services.transaction(settling.cancel_job, tenant_id, job_id, by=by or caller.actor)
    if state == JobState.CANCELLING:
        note_foreign(caller, tenant_id, job_id, "cancelled")
        # The rest of a large job is the courier's.
        await services.transaction(settling.settle_open, job_id, limit=services.settings.sweep_chunk)


async def delete_one(
    services: Services, caller: Principal, tenant_id: UUID, job_id: UUID, *, by: Actor | None = None
) -> None:
    """Forget a job of this tenant. Raises `JobNotDeletable` where it is not at its end."""
    if not await services.transaction(retention.delete_job, tenant_id, job_id, by=by or caller.actor):
        shown = public_id(JOB_PREFIX, job_id)
        raise JobNotDeletable(shown, (await find_job(services, caller, shown)).state)
    note_foreign(caller, tenant_id, job_id, "deleted")
