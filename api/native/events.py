"""`GET /v1/jobs/{id}/events`: what happens to a job as server-sent events, resumed by `Last-Event-ID`.

An id says all that was sent before it, `<events>.<first claim>.<tenths>`: so it holds in any process, after any pause.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection

from api.deps import Caller, InjectedServices, Services
from api.native.finding import find_job
from api.native.views import event_entry
from api.schemas import JobObject
from jobs.errors import InvalidInput, JobNotFound
from jobs.queries import progress, reading
from jobs.queries.job_events import FIRST_CLAIM
from jobs.queries.reading import Job

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

EVENT_STREAM = "text/event-stream"
INTERVAL = 1.0  # seconds between two looks
COMMENT_AFTER = 3.0  # seconds of silence
TENTHS = 10


@dataclass(frozen=True, slots=True)
class Seen:
    """What a reader has: events up to `number`, perhaps the first claim, and so many tenths of the lines."""

    number: int = FIRST_CLAIM
    has_first_claim: bool = False
    tenths: int = 0

    @classmethod
    def parse(cls, text: str) -> Seen:
        """Raises `InvalidInput`."""
        found = re.fullmatch(r"([0-9]{1,4})\.([01])\.([0-9]{1,2})", text)
        if found is None:
            raise InvalidInput("no id of an event of this stream", param="last-event-id")
        return cls(int(found[1]), found[2] == "1", int(found[3]))

    def __str__(self) -> str:
        return f"{self.number}.{int(self.has_first_claim)}.{self.tenths}"


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {EVENT_STREAM: {}}, "description": "Server-sent events, to the job's end."}},
)
async def read_events(
    job_id: str,
    caller: Caller,
    services: InjectedServices,
    last_event_id: Annotated[str | None, Header(max_length=20)] = None,
) -> StreamingResponse:
    """Events of a job until its end: those of its timeline, `progress` at each tenth of its lines, and `ended`.

    A reader that comes back with the `Last-Event-ID` it saw gets what it missed, and nothing twice.
    """
    seen = Seen() if last_event_id is None else Seen.parse(last_event_id)
    job = await find_job(services, caller, job_id)
    stream = _stream(services, job, seen)
    return StreamingResponse(stream, media_type=EVENT_STREAM, headers={"cache-control": "no-store"})


async def _stream(services: Services, job: Job, seen: Seen) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    spoke = loop.time()
    while True:
        try:
            job, messages, seen = await services.transaction(_look, job, seen)
        except JobNotFound:
            return  # deleted: the next request says so
        if messages:
            spoke = loop.time()
            yield b"".join(messages)
        if job.is_terminal or services.job_watch.is_closed:
            return
        if loop.time() - spoke >= COMMENT_AFTER:
            spoke = loop.time()
            yield b": still here\n\n"
        # The end of the job wakes it at once.
        await services.job_watch.wait(job.id, INTERVAL)


def _look(connection: Connection, before: Job, seen: Seen) -> tuple[Job, list[bytes], Seen]:
    """What is new since `seen`, as messages. The job is read first, so no event of its time is behind its state."""
    job = reading.get_job(connection, before.tenant_id, before.id)
    if job is None:
        raise JobNotFound(str(before.id))
    messages = []
    after = 0 if not seen.has_first_claim else seen.number
    for event in progress.read_events(connection, job.id, after=after, limit=1000):
        if event.number == FIRST_CLAIM:
            seen = replace(seen, has_first_claim=True)
        elif event.number > seen.number:
            seen = replace(seen, number=event.number)
        else:
            continue
        messages.append(_message(event.kind, seen, event_entry(event).model_dump()))
    tenths = TENTHS * job.last_seq // job.total
    if tenths > seen.tenths:
        seen = replace(seen, tenths=tenths)
        messages.append(_message("progress", seen, JobObject.of(job).model_dump(mode="json")))
    if job.is_terminal:
        messages.append(_message("ended", seen, JobObject.of(job).model_dump(mode="json")))
    return job, messages, seen


def _message(kind: str, seen: Seen, data: dict[str, Any]) -> bytes:
    return b"event: %s\nid: %s\ndata: %s\n\n" % (kind.encode(), str(seen).encode(), orjson.dumps(data))
