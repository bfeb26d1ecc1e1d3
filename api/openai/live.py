"""`/v1/chat/completions`, `/v1/completions`, `/v1/responses`: answered by the workers of batches, before batches."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any
from uuid import UUID

import orjson
from fastapi import APIRouter, Depends, Request
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from api.deps import Caller, InjectedServices, Services
from api.http_protocol import end_of_input
from api.openai.completions import CompletionShape
from api.openai.documents import read_object
from api.openai.lines import Endpoint, read_request
from api.openai.live_hub import LiveAnswer, LiveHub, Message
from api.openai.live_models import find_model
from api.openai.repeats import Attempt, RequestAttempt
from api.openai.request_schemas import live_request
from api.openai.responses import ResponseShape
from api.openai.streams import AnswerRefused, AnswerShape, require_success, stream
from api.schemas import JobObject
from api.tasks import end_tasks
from jobs.errors import InvalidInput, JobNotFound
from jobs.ids import JOB_PREFIX, public_id
from jobs.queries import reading
from jobs.queries.tenants import Tenant
from jobs.requests import ModelLimits, StagedLine

router = APIRouter(prefix="/v1", tags=["live"])

MAX_PROMPTS = 256  # of one legacy completion
TIERS = ("auto", "default", "flex", "scale", "priority", "fast")
FIRST_WAIT = 5.0  # seconds that a stream's headers wait for its first message; clients give up after 600
QUEUED: dict[int | str, dict[str, Any]] = {202: {"model": JobObject, "description": "A job, with `background`."}}
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def _hub(request: Request) -> LiveHub:
    found = request.app.state.live
    assert isinstance(found, LiveHub)
    return found


Hub = Annotated[LiveHub, Depends(_hub)]


@router.post("/chat/completions", responses=QUEUED, openapi_extra=live_request("/v1/chat/completions"))
async def chat_completions(
    request: Request, caller: Caller, services: InjectedServices, hub: Hub, attempt: RequestAttempt
) -> Response:
    """Answer a conversation; with `stream` as server-sent events."""
    return await _answer(request, caller, services, hub, attempt, "/v1/chat/completions")


@router.post("/completions", responses=QUEUED, openapi_extra=live_request("/v1/completions"))
async def completions(
    request: Request, caller: Caller, services: InjectedServices, hub: Hub, attempt: RequestAttempt
) -> Response:
    """Complete one prompt or several; with `stream` as server-sent events."""
    return await _answer(request, caller, services, hub, attempt, "/v1/completions")


@router.post("/responses", openapi_extra=live_request("/v1/responses"))
async def responses(
    request: Request, caller: Caller, services: InjectedServices, hub: Hub, attempt: RequestAttempt
) -> Response:
    """Answer a conversation, of which nothing is kept for a later request; with `stream` as server-sent events."""
    return await _answer(request, caller, services, hub, attempt, "/v1/responses")


async def _answer(
    request: Request, caller: Tenant, services: Services, hub: LiveHub, attempt: Attempt, endpoint: Endpoint
) -> Response:
    body, sha256 = await read_object(services, request)
    is_flex, is_in_background = _tier(body, endpoint)
    found = await find_model(services, body.get("model"))
    model = found.limits
    streams, options = _stream_options(body, endpoint)
    lines, repeated = await asyncio.to_thread(_lines, body, endpoint, model)
    created = int(time.time())
    claim = attempt.claim(sha256)
    if is_in_background:
        if streams:
            raise InvalidInput("not possible in the background", param="stream")
        job_id, _ = await hub.queue(caller.id, model.name, lines, claim)
        return await _accepted(services, caller, job_id)
    async with AsyncExitStack() as stack:
        answer = await stack.enter_async_context(
            hub.queued(caller.id, model.name, lines, claim)
            if is_flex
            else hub.answering(caller.id, found, lines, streams=streams, claim=claim)
        )
        tier = "flex" if is_flex else "default"
        shape: AnswerShape
        if endpoint == "/v1/responses":
            shape = ResponseShape(answer.job_id.hex, model.name, created, tier, repeated)
        else:
            is_chat = endpoint == "/v1/chat/completions"
            shape = CompletionShape(
                id=f"{'chatcmpl' if is_chat else 'cmpl'}-{answer.job_id.hex}",
                model=model.name,
                created=created,
                fingerprint=_fingerprint(model),
                is_chat=is_chat,
                n=body.get("n") or 1,
                num_lines=len(lines),
                wants_usage=bool(options.get("include_usage")),
                wants_running_usage=bool(options.get("continuous_usage_stats")),
                service_tier=tier,
            )
        if not streams:
            return await _whole(request, answer, shape)
        return await _streamed(request, answer, shape, stack)


def _tier(body: dict[str, Any], endpoint: Endpoint) -> tuple[bool, bool]:
    """Whether a request waits its turn among batches, and whether its caller comes back for the answer."""
    tier = body.get("service_tier")
    background = None if endpoint == "/v1/responses" else body.pop("background", None)
    if tier is not None and tier not in TIERS:
        raise InvalidInput(f"one of {', '.join(TIERS)} is expected", param="service_tier")
    if background not in (None, True, False):
        raise InvalidInput("true or false is expected", param="background")
    if background and tier != "flex":
        raise InvalidInput("needs service_tier: flex", param="background")
    return tier == "flex", bool(background)


async def _accepted(services: Services, caller: Tenant, job_id: UUID) -> Response:
    job = await services.transaction(reading.get_job, caller.id, job_id)
    if job is None:
        raise JobNotFound(public_id(JOB_PREFIX, job_id))
    answer = JobObject.of(job)
    return Response(
        answer.model_dump_json(), 202, headers={"location": f"/v1/jobs/{answer.id}"}, media_type="application/json"
    )


def _stream_options(body: dict[str, Any], endpoint: Endpoint) -> tuple[bool, dict[str, Any]]:
    streams, options = body.get("stream"), body.get("stream_options")
    if streams not in (None, True, False):
        raise InvalidInput("true or false is expected", param="stream")
    if options is None:
        return bool(streams), {}
    if not streams:
        raise InvalidInput("needs stream: true", param="stream_options")
    known = {"include_obfuscation"}
    if endpoint != "/v1/responses":
        known |= {"include_usage", "continuous_usage_stats"}
    if not isinstance(options, dict) or not options.keys() <= known:
        raise InvalidInput(f"an object of {', '.join(sorted(known))} is expected", param="stream_options")
    return True, options


def _lines(
    body: dict[str, Any], endpoint: Endpoint, model: ModelLimits
) -> tuple[Sequence[StagedLine], Mapping[str, Any]]:
    """The lines of a request, and what its answer repeats of it."""
    prompts = body.get("prompt") if endpoint == "/v1/completions" else None
    bodies: Sequence[dict[str, Any]] = [body]
    # Several prompts are several lines: strings, or lists of token ids.
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
        if len(prompts) > MAX_PROMPTS:
            raise InvalidInput(f"at most {MAX_PROMPTS} prompts are possible; send a batch", param="prompt")
        bodies = [{**body, "prompt": prompt} for prompt in prompts]
    asked = [read_request(one, endpoint, number, model) for number, one in enumerate(bodies, 1)]
    return [each.line for each in asked], asked[0].repeated


def _fingerprint(model: ModelLimits) -> str:
    """Changes where the model does."""
    known = f"{model.name} {model.max_model_len} {model.vocab_size}".encode()
    return f"fp_{hashlib.blake2b(known, digest_size=5).hexdigest()}"


async def _whole(request: Request, answer: LiveAnswer, shape: AnswerShape) -> Response:
    """All lines in one answer. A caller that hangs up ends it."""
    bodies: dict[int, dict[str, Any]] = {}

    async def collect() -> None:
        async for message in answer.messages():
            require_success(message)
            if "answer" in message:
                bodies[message["line"]] = message["answer"]["response"]["body"]

    collecting = asyncio.ensure_future(collect())
    leaving = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait([collecting, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # the caller has disconnected
        await collecting
    except AnswerRefused as refused:
        return _json(refused.body, refused.status)
    finally:
        for task in (collecting, leaving):
            task.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)
    return _json(shape.whole(bodies), 200)


async def _hung_up(request: Request) -> None:
    """Wait until the caller has closed the connection, or its side: no client of this API goes on to read then."""
    closed = asyncio.ensure_future(end_of_input(request.scope).wait())
    # The body has been read: the next message is the disconnect.
    disconnected = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait([closed, disconnected], return_when=asyncio.FIRST_COMPLETED)
    finally:
        closed.cancel()
        disconnected.cancel()


async def _streamed(request: Request, answer: LiveAnswer, shape: AnswerShape, stack: AsyncExitStack) -> Response:
    """A stream whose headers wait a moment for the first message, so that what a worker refuses has its status.

    It takes over what `stack` ends. A caller that hangs up ends it at any time.
    """
    messages = answer.messages()
    first = asyncio.ensure_future(anext(messages))
    leaving = asyncio.ensure_future(_hung_up(request))
    stack.push_async_callback(end_tasks, [first, leaving])
    await asyncio.wait([first, leaving], timeout=FIRST_WAIT, return_when=asyncio.FIRST_COMPLETED)
    if first.done():
        try:
            require_success(first.result())
        except AnswerRefused as refused:
            return _json(refused.body, refused.status)
    elif leaving.done():
        return Response(status_code=499)  # the caller has disconnected

    async def all_messages() -> AsyncIterator[Message]:
        yield await first
        async for message in messages:
            yield message

    ending = stack.pop_all()
    return StreamingResponse(
        _closing(stream(all_messages(), shape, leaving), ending),
        media_type="text/event-stream",
        headers=SSE_HEADERS,
        background=BackgroundTask(ending.aclose),
    )


async def _closing(events: AsyncIterator[bytes], ending: AsyncExitStack) -> AsyncIterator[bytes]:
    """End the answer with its stream, also where the caller hangs up in the middle."""
    try:
        async for event in events:
            if event:
                yield event
    finally:
        await asyncio.shield(ending.aclose())


def _json(body: dict[str, Any], status: int) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
