"""`/v1/batches`: create, retrieve, list, cancel."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection

from api.deps import Caller, InjectedServices, Services
from api.openai.documents import read_document
from api.openai.files import MAX_SECONDS, MIN_SECONDS, find_file
from api.openai.lines import ENDPOINTS
from api.openai.objects import BatchList, BatchObject
from api.openai.repeats import RequestAttempt
from jobs.errors import BatchEnded, BatchMissing, FileMissing, InvalidInput
from jobs.ids import BATCH_PREFIX, parse_id, public_id
from jobs.queries import batches, creations, settling
from jobs.queries.batches import Batch, OnError
from jobs.queries.creations import AlreadyMade
from jobs.queries.tenants import Tenant
from jobs.requests import Metadata, Window, window_seconds
from jobs.states import JobState
from jobs.strict_model import FewComplaints

router = APIRouter(prefix="/v1/batches", tags=["batches"])


class ExpiresAfter(FewComplaints):
    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_SECONDS, le=MAX_SECONDS)]


class CreateBatch(FewComplaints):
    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str
    endpoint: Annotated[str, Field(json_schema_extra={"enum": list(ENDPOINTS)})]
    completion_window: Window
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    on_error: OnError | None = Field(
        default=None, description="fail (the default): an invalid line ends the batch. skip: it is that line's error"
    )


class BatchesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(default=None, description="id of the last batch that you have")
    limit: int = Field(default=20, ge=1, le=100)


def _schema() -> dict[str, Any]:
    schema = CreateBatch.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["properties"]["output_expires_after"] = {"type": ["object", "null"]}
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post("", openapi_extra=_schema())
async def create_batch(
    request: Request, caller: Caller, services: InjectedServices, attempt: RequestAttempt
) -> BatchObject:
    """Run the lines of a file. The batch can be read at once; its lines are checked after this answer."""
    asked, sha256 = await read_document(services, request, CreateBatch)
    if asked.endpoint not in ENDPOINTS:
        raise InvalidInput(f"one of {', '.join(ENDPOINTS)} is expected", param="endpoint")
    file = await find_file(services, caller, asked.input_file_id)
    if file.purpose != "batch":
        raise InvalidInput(f"the file's purpose is {file.purpose!r}, not 'batch'", param="input_file_id")
    expiry = asked.output_expires_after

    def make(connection: Connection) -> Batch:
        batch = batches.create(
            connection,
            caller.id,
            endpoint=asked.endpoint,
            input_file_id=file.id,
            completion_window=asked.completion_window,
            window_seconds=window_seconds(asked.completion_window),
            metadata=asked.metadata,
            on_error=asked.on_error or "fail",
            output_seconds=None if expiry is None else expiry.seconds,
        )
        if batch is None:
            raise FileMissing(asked.input_file_id)
        creations.record(
            connection,
            attempt.claim(sha256),
            batch.id,
            is_standing=lambda made: batches.get_batch(connection, caller.id, made) is not None,
        )
        return batch

    try:
        batch = await services.transaction(make)
    except AlreadyMade as earlier:
        return BatchObject.of(await _find(services, caller, public_id(BATCH_PREFIX, earlier.object_id)))
    services.batches_wait.set()
    return BatchObject.of(batch)


@router.get("")
async def list_batches(
    caller: Caller, services: InjectedServices, query: Annotated[BatchesQuery, Query()]
) -> BatchList:
    """Your batches, newest first."""
    after = None
    if query.after is not None and (after := parse_id(BATCH_PREFIX, query.after)) is None:
        raise InvalidInput("not a batch's id", param="after")
    found = await services.transaction(batches.list_batches, caller.id, after=after, limit=query.limit + 1)
    page = [BatchObject.of(batch) for batch in found[: query.limit]]
    return BatchList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(found) > query.limit,
    )


@router.get("/{batch_id}")
async def retrieve_batch(batch_id: str, caller: Caller, services: InjectedServices) -> BatchObject:
    """A batch as it stands."""
    batch = await _find(services, caller, batch_id)
    if batch.job is not None and batch.job.ended_at is not None and batch.finalized_at is None:
        services.batches_wait.set()
    return BatchObject.of(batch)


@router.post("/{batch_id}/cancel")
async def cancel_batch(batch_id: str, caller: Caller, services: InjectedServices) -> BatchObject:
    """Stop a batch. What is finished is kept; a batch at its end is a 409."""
    batch = await _find(services, caller, batch_id)
    if batch.is_terminal:
        raise BatchEnded(batch_id, batch.status)
    if batch.job_id is None and not await services.transaction(
        batches.cancel_validating, caller.id, batch.id, by=caller.actor
    ):
        batch = await _find(services, caller, batch_id)  # it has a job by now, or has failed
    if batch.job_id is not None:
        state = await services.transaction(settling.cancel_job, caller.id, batch.job_id, by=caller.actor)
        if state == JobState.CANCELLING:
            # The rest of a large job is the courier's.
            await services.transaction(settling.settle_open, batch.job_id, limit=services.settings.sweep_chunk)
        services.batches_wait.set()
    return BatchObject.of(await _find(services, caller, batch_id))


async def _find(services: Services, caller: Tenant, batch_id: str) -> Batch:
    identity = parse_id(BATCH_PREFIX, batch_id)
    batch = None if identity is None else await services.transaction(batches.get_batch, caller.id, identity)
    if batch is None:
        raise BatchMissing(batch_id[:100])
    return batch
