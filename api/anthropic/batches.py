"""`/v1/messages/batches`: create, list, retrieve, cancel, results, delete, as Anthropic's client reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection
from starlette.responses import StreamingResponse

from api.anthropic.answers import result_line
from api.anthropic.requests import line_of
from api.deps import Caller, InjectedServices, Services
from api.native.jobs import cancel_one, delete_one
from api.native.submissions import find_model
from api.openai.documents import json_body, read_document
from api.openai.repeats import RequestAttempt
from jobs.errors import InvalidInput, MessageBatchMissing, MessageBatchNotEnded, TooLarge
from jobs.ids import MESSAGE_BATCH_PREFIX, new_id, parse_id, public_id
from jobs.queries import creations, reading, searching, submission
from jobs.queries.creations import AlreadyMade
from jobs.queries.reading import Job
from jobs.queries.tenants import Principal
from jobs.requests import CustomId, JobOptions, ModelLimits, Params, StagedLine, parse_request, refused_line
from jobs.states import JobState
from jobs.strict_model import StrictModel

WINDOW = timedelta(hours=24)
PAGE_ROWS = 500


class MessageErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None
    code: str | None


class MessageError(BaseModel):
    """Every failure under this address, in Anthropic's shape."""

    type: Literal["error"]
    error: MessageErrorDetail


router = APIRouter(
    prefix="/v1/messages/batches",
    tags=["message batches"],
    responses={"4XX": {"model": MessageError}, "5XX": {"model": MessageError}},
)


class BatchRequest(StrictModel):
    custom_id: CustomId
    params: dict[str, Any]


class CreateMessageBatch(StrictModel):
    """Requests of one model."""

    requests: Annotated[list[BatchRequest], Field(min_length=1, fail_fast=True)]


SCHEMAS: dict[str, Any] = CreateMessageBatch.model_json_schema(ref_template="#/components/schemas/{model}")["$defs"]


class MessageCounts(BaseModel):
    """All but `processing` are 0 until the batch has ended."""

    processing: int
    succeeded: int
    errored: int
    canceled: int
    expired: int


class MessageBatch(BaseModel):
    id: str
    type: Literal["message_batch"] = "message_batch"
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: MessageCounts
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    cancel_initiated_at: datetime | None
    archived_at: None = None
    results_url: str | None

    @classmethod
    def of(cls, job: Job) -> MessageBatch:
        """A job, whichever face made it. One without a deadline is shown with the window of a batch."""
        name = public_id(MESSAGE_BATCH_PREFIX, job.id)
        if job.is_terminal:
            counts = MessageCounts(
                processing=0,
                succeeded=job.completed,
                errored=job.failed,
                canceled=job.cancelled,
                expired=job.expired,
            )
        else:
            counts = MessageCounts(processing=job.total, succeeded=0, errored=0, canceled=0, expired=0)
        is_cancelling = job.state == JobState.CANCELLING
        return cls(
            id=name,
            processing_status="ended" if job.is_terminal else "canceling" if is_cancelling else "in_progress",
            request_counts=counts,
            created_at=job.created_at.astimezone(UTC),
            expires_at=(job.expires_at or job.in_progress_at + WINDOW).astimezone(UTC),
            ended_at=None if job.ended_at is None else job.ended_at.astimezone(UTC),
            cancel_initiated_at=None if job.cancelling_at is None else job.cancelling_at.astimezone(UTC),
            results_url=f"/v1/messages/batches/{name}/results" if job.is_terminal else None,
        )


class MessageBatchList(BaseModel):
    """Newest first. The next page is asked for with `after_id=<last_id>`."""

    data: list[MessageBatch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MessageBatchDeleted(BaseModel):
    id: str
    type: Literal["message_batch_deleted"] = "message_batch_deleted"


class _ListQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after_id: str | None = None
    limit: int = Field(default=20, ge=1, le=1000)


@router.post("", openapi_extra=json_body(CreateMessageBatch))
async def create_message_batch(
    request: Request, caller: Caller, services: InjectedServices, attempt: RequestAttempt
) -> MessageBatch:
    """Store a batch of messages; it runs as a job with a completion window of 24 hours. It can be read at once.

    A request whose `params` are wrong is that request's error, and the others run.
    """
    asked, sha256 = await read_document(services, request, CreateMessageBatch)
    if len(asked.requests) > services.settings.max_lines:
        raise TooLarge(f"More than {services.settings.max_lines} requests in one batch.", param="requests")
    model = await find_model(services, _model_name(asked))
    lines = await asyncio.to_thread(_lines, asked, model)
    options = JobOptions(model=model.name, completion_window="24h")
    job_id = new_id()

    def make(connection: Connection) -> None:
        creations.record(
            connection,
            attempt.claim(sha256),
            job_id,
            is_standing=lambda made: reading.get_job(connection, caller.id, made) is not None,
        )
        submission.open_job(connection, caller.id, options, job_id)
        submission.stage_lines(connection, job_id, lines)
        submission.publish(connection, job_id)

    try:
        await services.transaction(make)
    except AlreadyMade as earlier:
        return MessageBatch.of(await _find(services, caller, public_id(MESSAGE_BATCH_PREFIX, earlier.object_id)))
    services.notifier.notify(model.name, job_id)
    return MessageBatch.of(await _find(services, caller, public_id(MESSAGE_BATCH_PREFIX, job_id)))


def _model_name(asked: CreateMessageBatch) -> str:
    name = asked.requests[0].params.get("model")
    for place, one in enumerate(asked.requests):
        found = one.params.get("model")
        at = f"requests[{place}].params.model"
        if not isinstance(found, str) or not found or "\x00" in found:
            raise InvalidInput("the name of a model is needed", param=at)
        if found != name:
            raise InvalidInput(f"all requests of a batch have one model, here {str(name)[:100]!r}", param=at)
    return str(name)


def _lines(asked: CreateMessageBatch, model: ModelLimits) -> list[StagedLine]:
    lines = []
    for number, one in enumerate(asked.requests, 1):
        try:
            line = line_of(one.params) | {"custom_id": one.custom_id}
            lines.append(parse_request(line, number, Params(), model))
        except InvalidInput as error:
            lines.append(refused_line(number, one.custom_id, str(error), error.code, error.param))
    return lines


@router.get("")
async def list_message_batches(
    caller: Caller, services: InjectedServices, query: Annotated[_ListQuery, Query()]
) -> MessageBatchList:
    """Your batches and jobs, newest first."""
    after = None
    if query.after_id is not None and (after := parse_id(MESSAGE_BATCH_PREFIX, query.after_id)) is None:
        raise InvalidInput("not a message batch's id", param="after_id")
    found = await services.transaction(searching.search_jobs, caller.id, [], after=after, limit=query.limit + 1)
    page = [MessageBatch.of(job) for job in found[: query.limit]]
    return MessageBatchList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(found) > query.limit,
    )


@router.get("/{message_batch_id}")
async def retrieve_message_batch(message_batch_id: str, caller: Caller, services: InjectedServices) -> MessageBatch:
    """A batch as it stands."""
    return MessageBatch.of(await _find(services, caller, message_batch_id))


@router.post("/{message_batch_id}/cancel")
async def cancel_message_batch(message_batch_id: str, caller: Caller, services: InjectedServices) -> MessageBatch:
    """Stop a batch. What is finished is kept; one at its end stays as it is."""
    job = await _find(services, caller, message_batch_id)
    await cancel_one(services, caller, job.tenant_id, job.id)
    return MessageBatch.of(await _find(services, caller, message_batch_id))


@router.delete("/{message_batch_id}")
async def delete_message_batch(
    message_batch_id: str, caller: Caller, services: InjectedServices
) -> MessageBatchDeleted:
    """Forget a batch that has ended, with its requests and results."""
    job = await _find(services, caller, message_batch_id)
    await delete_one(services, caller, job.tenant_id, job.id)
    return MessageBatchDeleted(id=message_batch_id)


@router.get(
    "/{message_batch_id}/results",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-jsonl": {}}, "description": "A result a line, in any order."}},
)
async def read_message_results(message_batch_id: str, caller: Caller, services: InjectedServices) -> StreamingResponse:
    """The results of a batch that has ended."""
    job = await _find(services, caller, message_batch_id)
    if not job.is_terminal:
        raise MessageBatchNotEnded(message_batch_id)

    async def pages() -> AsyncIterator[bytes]:
        after = 0
        while results := await services.transaction(reading.read_results, job.id, after=after, limit=PAGE_ROWS):
            after = results[-1].seq
            yield await asyncio.to_thread(lambda page: b"".join(map(result_line, page)), results)

    return StreamingResponse(pages(), media_type="application/x-jsonl")


async def _find(services: Services, caller: Principal, message_batch_id: str) -> Job:
    identity = parse_id(MESSAGE_BATCH_PREFIX, message_batch_id)
    job = None if identity is None else await services.transaction(reading.get_job, caller.id, identity)
    if job is None:
        raise MessageBatchMissing(message_batch_id[:100])
    return job
