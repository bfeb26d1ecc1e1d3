"""A job in several requests: open it, append lines, finalize it. Nothing of it runs before."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from api.deps import Caller, InjectedServices, Services
from api.errors import UnsupportedMediaType
from api.native.finding import find_job, parse_job_id
from api.native.submissions import find_model
from api.openai.documents import json_body, read_document
from api.openai.repeats import RequestAttempt
from api.request_body import BYTE_ORDER_MARK, LineSplitter, read_whole
from api.schemas import JobObject
from jobs import strict_json
from jobs.errors import DuplicateCustomId, InvalidInput, JobNotFound, JobTakesNoLines, TooLarge
from jobs.ids import JOB_PREFIX, new_id, public_id
from jobs.queries import open_jobs
from jobs.queries.creations import AlreadyMade
from jobs.queries.open_jobs import OpenJob
from jobs.queries.tenants import Principal
from jobs.requests import JobOptions, ModelLimits, Params, PromptLine, StagedLine, check_priority, parse_request
from jobs.settings import Settings
from jobs.strict_model import StrictModel

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

JSON, NDJSON = "application/json", "application/x-ndjson"


class Lines(StrictModel):
    """Prompts to append, as in a submission."""

    prompts: Annotated[list[Annotated[str, Field(min_length=1)] | PromptLine], Field(min_length=1)]


_LINES: dict[str, Any] = json_body(Lines)
_LINES["requestBody"]["content"][NDJSON] = {"schema": {"type": "string", "description": "One object a line."}}


class Appended(BaseModel):
    """`lines` is how many the job has now; `appended`, how many of them this request stored."""

    id: str
    object: Literal["job.lines"] = "job.lines"
    appended: int
    lines: int


@router.post("/open", status_code=201, openapi_extra=json_body(JobOptions))
async def open_job(
    request: Request, response: Response, caller: Caller, services: InjectedServices, attempt: RequestAttempt
) -> JobObject:
    """Open a job that has no line yet. It is `validating` until it is finalized, and expires where nothing comes."""
    options, sha256 = await read_document(services, request, JobOptions)
    check_priority(options.priority, services.settings.max_priority)
    await find_model(services, options.model)
    params = orjson.dumps(options.params.model_dump(mode="json", by_alias=True, exclude_unset=True))
    job_id = new_id()
    try:
        await services.transaction(open_jobs.make, caller.id, options, params, job_id, attempt.claim(sha256))
    except AlreadyMade as earlier:
        job_id = earlier.object_id
    answer = await find_open_or_published(services, caller, public_id(JOB_PREFIX, job_id))
    response.headers["location"] = f"/v1/jobs/{answer.id}"
    return answer


@router.post("/{job_id}/lines", openapi_extra=_LINES)
async def append_lines(
    job_id: str, request: Request, caller: Caller, services: InjectedServices, attempt: RequestAttempt
) -> Appended:
    """Append prompts to an open job: all of this request or none. With an `Idempotency-Key` it can be sent again.

    A body is `{"prompts": […]}` or, as `application/x-ndjson`, one object a line.
    """
    identity = parse_job_id(job_id)
    settings = services.settings
    found = await services.transaction(open_jobs.find, caller.id, identity, expiry=settings.open_job_expiry)
    if found is None:
        await find_job(services, caller, job_id)  # where it was finalized, an earlier try may have stored these lines
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in (JSON, NDJSON):
        raise UnsupportedMediaType(f"The Content-Type is {media_type[:100]!r}; send {JSON} or {NDJSON}.")
    raw = await read_whole(request, max_bytes=settings.max_inline_bytes, timeout=settings.body_timeout)
    claim = attempt.claim(hashlib.sha256(media_type.encode() + b"\n" + raw).digest())
    batch = _NOTHING
    if found is not None:
        model = await find_model(services, found.model)
        batch = await asyncio.to_thread(_parsed, raw, media_type, found, model, settings)
    try:
        lines = await services.transaction(open_jobs.append, caller.id, identity, batch.numbered, claim)
    except AlreadyMade:
        # What the first try stored; the job may have been finalized since.
        job = await find_open_or_published(services, caller, job_id)
        count = await asyncio.to_thread(_count, raw, media_type, settings)
        return Appended(id=job_id, appended=count, lines=job.request_counts.total)
    except JobNotFound:
        raise JobTakesNoLines(job_id, (await find_job(services, caller, job_id)).state) from None
    except DuplicateCustomId as error:
        error.line = None if error.line is None else batch.body_lines[error.line - 1]
        raise
    return Appended(id=job_id, appended=len(batch.lines), lines=lines)


@router.post("/{job_id}/finalize", status_code=202)
async def finalize_job(job_id: str, caller: Caller, services: InjectedServices) -> JobObject:
    """Let an open job run: it takes no more lines, and its completion window begins. Finalizing again changes nothing.

    What was appended is what runs.
    """
    identity = parse_job_id(job_id)
    is_new = await services.transaction(open_jobs.finalize, caller.id, identity)
    job = await find_job(services, caller, job_id)
    if is_new:
        services.notifier.notify(job.model, job.id)
    return JobObject.of(job)


async def find_open_or_published(services: Services, caller: Principal, job_id: str) -> JobObject:
    """The caller's job, whether it takes lines or was published. Raises `JobNotFound`."""
    found = await services.transaction(
        open_jobs.find, caller.id, parse_job_id(job_id), expiry=services.settings.open_job_expiry
    )
    return JobObject.of(await find_job(services, caller, job_id)) if found is None else JobObject.of_open(found)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Checked lines of one request, numbered from 1; `body_lines` are their places in it."""

    lines: Sequence[StagedLine]
    has_own_id: Sequence[bool]
    body_lines: Sequence[int]
    most: int

    def numbered(self, total: int) -> list[StagedLine]:
        """As the lines of a job that has `total`. Raises `TooLarge`."""
        if total + len(self.lines) > self.most:
            raise TooLarge(f"More than {self.most} lines in one job.")
        numbered = []
        for line, is_own in zip(self.lines, self.has_own_id, strict=True):
            number = total + line.line
            numbered.append(replace(line, line=number, custom_id=line.custom_id if is_own else f"request-{number}"))
        return numbered


_NOTHING = _Batch((), (), (), most=0)


def _documents(raw: bytes, media_type: str, settings: Settings) -> Iterator[tuple[int, object]]:
    """The place and document of each line, or prompt. Raises `InvalidInput` with the line."""
    if media_type == JSON:
        document = strict_json.parse(raw.removeprefix(BYTE_ORDER_MARK), max_depth=settings.max_json_depth)
        if (
            not isinstance(document, dict)
            or document.keys() != {"prompts"}
            or not isinstance(document["prompts"], list)
        ):
            raise InvalidInput("a JSON object with a list of prompts is expected, and nothing else", param="prompts")
        yield from enumerate(document["prompts"], 1)
        return
    splitter = LineSplitter(max_line_bytes=settings.max_line_bytes, max_lines=settings.max_lines)
    for line in itertools.chain(splitter.feed(raw), splitter.close()):
        try:
            yield line.number, strict_json.parse(line.raw, max_depth=settings.max_json_depth)
        except InvalidInput as error:
            error.line = line.number
            raise


def _count(raw: bytes, media_type: str, settings: Settings) -> int:
    return sum(1 for _ in _documents(raw, media_type, settings))


def _parsed(raw: bytes, media_type: str, job: OpenJob, model: ModelLimits, settings: Settings) -> _Batch:
    defaults = Params.model_validate_json(job.params)
    lines: list[StagedLine] = []
    has_own_id: list[bool] = []
    body_lines: list[int] = []
    for place, document in _documents(raw, media_type, settings):
        try:
            lines.append(parse_request(document, len(lines) + 1, defaults, model))
        except InvalidInput as error:
            if media_type == JSON:
                at = f"prompts[{place - 1}]"
                error.param = f"{at}.{error.param}" if error.param is not None else at
            else:
                error.line = place
            raise
        has_own_id.append(isinstance(document, dict) and document.get("custom_id") is not None)
        body_lines.append(place)
    if not lines:
        raise InvalidInput("The body has no lines: append at least one prompt.")
    return _Batch(lines, has_own_id, body_lines, settings.max_lines)
