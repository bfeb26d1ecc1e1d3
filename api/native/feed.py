"""`GET /v1/events`: how all that a page shows changes, as server-sent events."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import psycopg
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError

from api import session_cookie
from api.dashboard.assets import load_assets
from api.deps import Caller, InjectedServices
from api.feed_hub import Interest
from api.feed_items import Search
from api.http_protocol import end_of_input
from api.native.events import EVENT_STREAM
from api.native.finding import parse_job_id
from jobs import search
from jobs.errors import InvalidInput

router = APIRouter(prefix="/v1", tags=["overview"])

MOST_JOBS = 100
TOPICS = frozenset({"overview", "queue", "workers"})


class FeedQuery(BaseModel):
    """A misspelt parameter is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    topics: str = Field(default="", max_length=100, description="of overview, queue and workers; with commas")
    jobs: str = Field(default="", max_length=4000, description=f"ids of up to {MOST_JOBS} jobs, with commas")
    open: str | None = Field(
        default=None, description="a job whose newest minutes, failures, timeline and webhooks come, too"
    )
    q: str = Field(default="", max_length=2000, description="a search, for jobs.new")
    newest: str | None = Field(
        default=None, description="the newest job that is known: jobs.new counts the newer ones that match q"
    )
    last: str | None = Field(
        default=None, max_length=40, description="as the header Last-Event-ID, where there is none"
    )


@router.get(
    "/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {EVENT_STREAM: {}},
            "description": "Events overview, queue, workers, job, gone, jobs.new, and of the open job minute, "
            "failures, timeline and deliveries: each says how a thing is now.",
        },
        204: {"description": "Too many streams are open: read the endpoints themselves, from time to time."},
    },
)
async def read_feed(
    request: Request,
    caller: Caller,
    services: InjectedServices,
    query: Annotated[FeedQuery, Query()],
    last_event_id: Annotated[str | None, Header(max_length=40)] = None,
) -> Response:
    """How what a page shows changes, at most once a second each; all of it first.

    A reader that comes back with the `Last-Event-ID` it saw gets what changed since. Where the process is another one,
    it gets `reset`, and everything. A session has four streams at most.
    """
    session = services.cookies.read(request.cookies.get(session_cookie.COOKIE, ""))
    session_id = None if session is None else session.id
    interest = _interest(query, caller.scope)
    if not services.feed.has_room(session_id):
        return Response(status_code=204)

    async def holds() -> bool:
        try:
            return await services.principals.get(caller.key_id) is not None
        except (SQLAlchemyError, psycopg.Error, OSError):
            return True  # until Postgres answers again

    stream = services.feed.read(
        interest,
        last=last_event_id or query.last,
        session=session_id,
        version=load_assets().digest,
        holds=holds,
        # A page that was left looks like one that only sends no more, until something is sent to it.
        is_gone=end_of_input(request.scope).is_set,
    )
    return StreamingResponse(stream, media_type=EVENT_STREAM, headers={"cache-control": "no-store"})


def _interest(query: FeedQuery, scope: UUID | None) -> Interest:
    """Raises `InvalidInput`, and `JobNotFound` for what is no id."""
    topics = frozenset(filter(None, query.topics.split(",")))
    if topics - TOPICS:
        raise InvalidInput(f"of {', '.join(sorted(TOPICS))}", param="topics")
    jobs = {parse_job_id(job_id) for job_id in query.jobs.split(",") if job_id}
    if len(jobs) > MOST_JOBS:
        raise InvalidInput(f"at most {MOST_JOBS}", param="jobs")
    opened = None
    if query.open is not None:
        opened = parse_job_id(query.open)
        jobs.add(opened)
    terms = tuple(search.parse(query.q))
    return Interest(
        scope=scope,
        topics=topics,
        jobs=frozenset(jobs),
        opened=opened,
        search=None if query.newest is None else Search(scope, terms, parse_job_id(query.newest)),
    )
