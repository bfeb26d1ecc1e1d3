"""Results of a job, streamed while it runs: whole, in short, or as CSV; of some lines or all; and one line with all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Literal
from uuid import UUID

import orjson
from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.deps import Caller, InjectedServices, Services
from api.native import previews
from api.native.finding import find_job
from api.native.views import LineObject, line_object
from api.parameters import Fingerprint
from jobs import fingerprints
from jobs.errors import LineNotFound
from jobs.ids import public_id
from jobs.queries import lines
from jobs.queries.lines import Filter, LineResult
from jobs.queries.reading import Job

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

NDJSON = "application/x-ndjson"
CSV = "text/csv; charset=utf-8"
PAGE_ROWS = 500
PAGE_BYTES = 1024 * 1024
MAX_SEQ = 2**31 - 1  # what the column holds
MAX_LINE = 2**31 - 1


class ResultsQuery(BaseModel):
    """A misspelt parameter is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    after: int | None = Field(default=None, ge=0, le=MAX_SEQ, description="`seq` of the last line that you have")
    before: int | None = Field(
        default=None, ge=1, le=MAX_SEQ, description="newest first, from the line before this `seq`; not with `after`"
    )
    limit: int | None = Field(default=None, ge=1, le=MAX_SEQ, description="lines at most")
    state: Literal["completed", "failed", "cancelled", "expired", "truncated"] | None = Field(
        default=None, description="truncated: cut by max_tokens"
    )
    fingerprint: Fingerprint | None = Field(
        default=None, description="of a kind of failure, as the job's `failures` have it"
    )
    preview: int | None = Field(
        default=None, ge=0, le=100_000, description="lines in short, texts cut after so many characters"
    )
    format: Literal["jsonl", "csv"] = "jsonl"

    @model_validator(mode="after")
    def _one_direction(self) -> ResultsQuery:
        if self.after is not None and self.before is not None:
            raise ValueError("either 'after' or 'before', not both")
        if self.fingerprint is not None and self.state is not None:
            raise ValueError("either 'state' or 'fingerprint', not both")
        return self

    @property
    def filter(self) -> Filter:
        """Which lines are wanted."""
        if self.fingerprint is not None:
            return Filter(fingerprint=fingerprints.parse(self.fingerprint))
        return Filter(is_truncated=True) if self.state == "truncated" else Filter(state=self.state)


@router.get(
    "/{job_id}/results",
    response_class=StreamingResponse,
    responses={200: {"content": {NDJSON: {}, "text/csv": {}}, "description": "Result lines in the order of `seq`."}},
)
async def read_results(
    job_id: str, caller: Caller, services: InjectedServices, query: Annotated[ResultsQuery, Query()]
) -> StreamingResponse:
    """Result lines `{"id", "custom_id", "seq", "response", "error"}` after `after`, up to the newest at this moment.

    `seq` has no gaps, so a reader that comes back with the last one it saw misses nothing and gets nothing twice. The
    header `x-last-seq` says where this answer ends, `x-job-status` whether more will come. With `state` or
    `fingerprint` only those lines come, with `preview` each in short, with `before` newest first; the next page then
    goes on from the last line's `seq`.
    """
    job = await find_job(services, caller, job_id)
    headers = {"x-job-status": str(job.state)}
    pages = _pages(services, job, query)
    if query.before is None and (query.limit is None or query.filter == Filter()):
        after = query.after or 0
        last = job.last_seq if query.limit is None else min(job.last_seq, after + query.limit)
        headers["x-last-seq"] = str(max(last, after))
    # The first page comes before the status: what is wrong with the database by now is still a proper answer.
    first = await anext(pages, b"")

    async def body() -> AsyncIterator[bytes]:
        if query.format == "csv":
            yield previews.csv_header()
        yield first
        async for page in pages:
            yield page

    if query.format == "csv":
        headers["content-disposition"] = f'attachment; filename="{job_id}.csv"'
    return StreamingResponse(body(), headers=headers, media_type=CSV if query.format == "csv" else NDJSON)


@router.get("/{job_id}/lines/{line}")
async def read_line(
    job_id: str, line: Annotated[int, Path(ge=1, le=MAX_LINE)], caller: Caller, services: InjectedServices
) -> LineObject:
    """One line with its request as it is stored, its result, and where and when it ran."""
    job = await find_job(services, caller, job_id)
    found = await services.transaction(lines.read_line, job.id, line)
    if found is None:
        raise LineNotFound(job_id, line)
    return line_object(job, found)


class _ResultsGone(Exception):
    """The job was deleted while its results were being read."""


async def _pages(services: Services, job: Job, query: ResultsQuery) -> AsyncIterator[bytes]:
    """The wanted lines up to the job's newest, a page a transaction."""
    is_forward, which = query.before is None, query.filter
    at = (query.after or 0) if query.before is None else min(query.before, job.last_seq + 1)
    left = query.limit if query.limit is not None else MAX_SEQ
    rows = PAGE_ROWS // 10
    while left > 0 and (at < job.last_seq if is_forward else at > 1):
        # Nothing of what is settled later than `job` was read: its status and last `seq` are in the headers already.
        results, at = await services.transaction(
            lines.read_chunk, job.id, which, at=at, last_seq=job.last_seq, is_forward=is_forward, limit=min(rows, left)
        )
        if not results:
            if which == Filter():
                raise _ResultsGone
            continue
        left -= len(results)
        page = _written(job.id, results, query)
        # Results may be bytes or megabytes each: the next page is as large as this one says it may be.
        size = sum(len(result.body) for result in results)
        rows = max(1, min(PAGE_ROWS, PAGE_BYTES * len(results) // max(1, size)))
        yield page


def _written(job_id: UUID, results: Sequence[LineResult], query: ResultsQuery) -> bytes:
    if query.format == "csv":
        return previews.as_csv(results, query.preview)
    if query.preview is not None:
        return previews.as_json_lines(results, query.preview)
    return b"".join(_line(job_id, result) for result in results)


def _line(job_id: UUID, result: LineResult) -> bytes:
    # What is stored is the rest of the object: {"response": …, "error": …}.
    beginning = orjson.dumps(
        {"id": f"{public_id('req_', job_id)}-{result.line}", "custom_id": result.custom_id, "seq": result.seq}
    )
    return beginning[:-1] + b"," + result.body[1:] + b"\n"
