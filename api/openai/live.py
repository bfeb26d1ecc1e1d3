"""`/v1/chat/completions` and `/v1/completions`: answered by the workers that run batches, before all batches."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any
from uuid import UUID

import orjson
from fastapi import APIRouter, Depends, Request
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from api.deps import Caller, InjectedServices, Services
from api.http_protocol import end_of_input
from api.openai.documents import read_object
from api.openai.live_hub import LiveAnswer, LiveHub, Message
from api.openai.live_models import find_model
from api.openai.repeats import Attempt, RequestAttempt
from api.openai.requests import Endpoint, translate
from api.openai.streams import AnswerRefused, StreamShape, add_usage, require_success, stream
from api.schemas import JobObject
from api.tasks import end_tasks
from jobs.errors import InvalidInput, JobNotFound
from jobs.ids import JOB_PREFIX, public_id
from jobs.queries import reading
from jobs.queries.tenants import Tenant
from jobs.requests import ModelLimits, Params, StagedLine, parse_request

router = APIRouter(prefix="/v1", tags=["live"])

MAX_PROMPTS = 256  # of one legacy completion
TIERS = ("auto", "default", "flex", "scale", "priority", "fast")
FIRST_WAIT = 5.0  # seconds that a stream's headers wait for its first message; clients give up after 600
_SCHEMA: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
    "responses": {
        "200": {
            "description": "OpenAI's completion object, or server-sent events.",
            "content": {"application/json": {}},
        }
    },
}
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def _hub(request: Request) -> LiveHub:
    found = request.app.state.live
    assert isinstance(found, LiveHub)
    return found


Hub = Annotated[LiveHub, Depends(_hub)]


@router.post("/chat/completions", openapi_extra=_SCHEMA)
async def chat_completions(
    request: Request, caller: Caller, services: InjectedServices, hub: Hub, attempt: RequestAttempt
) -> Response:
    """Answer a conversation; with `stream` as server-sent events."""
    return await _answer(request, caller, services, hub, attempt, "/v1/chat/completions")


@router.post("/completions", openapi_extra=_SCHEMA)
async def completions(
    request: Request, caller: Caller, services: InjectedServices, hub: Hub, attempt: RequestAttempt
) -> Response:
    """Complete one prompt or several; with `stream` as server-sent events."""
    return await _answer(request, caller, services, hub, attempt, "/v1/completions")


async def _answer(
    request: Request, caller: Tenant, services: Services, hub: LiveHub, attempt: Attempt, endpoint: Endpoint
) -> Response:
    body, sha256 = await read_object(services, request)
    is_flex, is_in_background = _tier(body)
    found = await find_model(services, body.get("model"))
    model = found.limits
    streams, options = _stream_options(body)
    lines = await asyncio.to_thread(_lines, body, endpoint, model)
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
        shape = StreamShape(
            id=f"{'chatcmpl' if endpoint.startswith('/v1/chat') else 'cmpl'}-{answer.job_id.hex}",
            model=model.name,
            created=created,
            fingerprint=_fingerprint(model),
            is_chat=endpoint == "/v1/chat/completions",
            n=body.get("n") or 1,
            num_lines=len(lines),
            wants_usage=bool(options.get("include_usage")),
            wants_running_usage=bool(options.get("continuous_usage_stats")),
            service_tier="flex" if is_flex else "default",
        )
        if not streams:
            return await _whole(request, answer, shape)
        return await _streamed(request, answer, shape, stack)


def _tier(body: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a request waits its turn among batches, and whether its caller comes back for the answer."""
    tier, background = body.get("service_tier"), body.pop("background", None)
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


def _stream_options(body: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    streams, options = body.get("stream"), body.get("stream_options")
    if streams not in (None, True, False):
        raise InvalidInput("true or false is expected", param="stream")
    if options is None:
        return bool(streams), {}
    if not streams:
        raise InvalidInput("needs stream: true", param="stream_options")
    known = {"include_usage", "continuous_usage_stats", "include_obfuscation"}
    if not isinstance(options, dict) or not options.keys() <= known:
        raise InvalidInput("an object with include_usage is expected", param="stream_options")
    return True, options


def _lines(body: dict[str, Any], endpoint: Endpoint, model: ModelLimits) -> list[StagedLine]:
    prompts = body.get("prompt") if endpoint == "/v1/completions" else None
    bodies: Sequence[dict[str, Any]] = [body]
    # Several prompts are several lines: strings, or lists of token ids.
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
        if len(prompts) > MAX_PROMPTS:
            raise InvalidInput(f"at most {MAX_PROMPTS} prompts are possible; send a batch", param="prompt")
        bodies = [{**body, "prompt": prompt} for prompt in prompts]
    return [parse_request(translate(one, endpoint), number, Params(), model) for number, one in enumerate(bodies, 1)]


def _fingerprint(model: ModelLimits) -> str:
    """Changes where the model does."""
    known = f"{model.name} {model.max_model_len} {model.vocab_size}".encode()
    return f"fp_{hashlib.blake2b(known, digest_size=5).hexdigest()}"


async def _whole(request: Request, answer: LiveAnswer, shape: StreamShape) -> Response:
    """All choices of all lines in one answer. A caller that hangs up ends it."""
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
    choices: list[dict[str, Any]] = []
    usage: dict[str, Any] = {}
    for line in sorted(bodies):
        choices += [{**choice, "index": len(choices) + place} for place, choice in enumerate(bodies[line]["choices"])]
        add_usage(usage, bodies[line]["usage"])
    return _json(
        {
            "id": shape.id,
            "object": "chat.completion" if shape.is_chat else "text_completion",
            "created": shape.created,
            "model": shape.model,
            "system_fingerprint": shape.fingerprint,
            "service_tier": shape.service_tier,
            "choices": choices,
            "usage": usage,
        },
        200,
    )


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


async def _streamed(request: Request, answer: LiveAnswer, shape: StreamShape, stack: AsyncExitStack) -> Response:
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
