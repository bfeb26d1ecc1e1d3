"""Live requests that wait for their answers in this process.

    submit ──▶ Postgres (a live job) ──▶ a worker ──PUBLISH live.<process>──▶ hub ──▶ each request's queue of messages

What Redis loses is found in Postgres: the hub looks at all that wait once a second, in one query.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import orjson
import psycopg
import redis.asyncio
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from api.deps import Services
from api.errors import NoPlaceNow, Unavailable
from api.tasks import end_tasks
from jobs.ids import new_id
from jobs.queries import live, reading, settling
from jobs.queries.creations import AlreadyMade, Claim
from jobs.queries.live import LiveModel
from jobs.queues import cancel_channel, live_channel
from jobs.requests import StagedLine

logger = logging.getLogger(__name__)

LOOK = 1.0  # seconds between two looks into Postgres
PAUSE = 0.5  # seconds before Redis is tried again
Message = dict[str, Any]
"""`{"line", "deltas", "answer"}`: pieces of a line's text, and its answer at its end."""


class WorkerLost(Unavailable):
    """The worker died, or was stopped, while it generated this answer."""

    def __init__(self) -> None:
        super().__init__("The worker that generated this answer is gone. Send the request again.")


class LiveAnswer:
    """The messages of one live job, until each of its lines has its answer.

    `may_move`: another worker takes it up where the first is lost, since nothing was said of it yet.
    """

    def __init__(self, job_id: UUID, num_lines: int, *, may_move: bool = False) -> None:
        self.job_id = job_id
        self.num_lines = num_lines
        self.may_move = may_move
        self.is_complete = False
        self._messages: asyncio.Queue[Message | Exception] = asyncio.Queue()
        self._epochs: dict[int, int] = {}
        self._answered: set[int] = set()

    def put(self, message: Message) -> None:
        """Take in a message. A line that is generated anew, elsewhere, ends the answer: its text was handed on."""
        line = message["line"]
        if line in self._answered:
            return
        if self._epochs.setdefault(line, message["epoch"]) != message["epoch"]:
            self.fail(WorkerLost())
            return
        if "answer" in message:
            self._answered.add(line)
        self._messages.put_nowait(message)

    def epoch_of(self, line: int) -> int:
        """The claim that this answer's text comes from, or any where it has none."""
        return self._epochs.get(line, 0)

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self._messages.put_nowait(error)

    async def messages(self) -> AsyncIterator[Message]:
        """Messages in the order in which they came. Raises what `fail` was given."""
        left = self.num_lines
        while left:
            message = await self._messages.get()
            if isinstance(message, Exception):
                raise message
            left -= "answer" in message
            self.is_complete = left == 0
            yield message


class LiveHub:
    """Submits live requests and hands out what comes back for them."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._channel = live_channel(new_id().hex)
        self._waiting: dict[UUID, LiveAnswer] = {}
        self._repeating: set[LiveAnswer] = set()
        """Wait for a job at batch priority, or one of an earlier try: Postgres has its answer, at its end."""
        settings = services.settings
        self._redis = (
            None
            if settings.redis_url is None
            else redis.asyncio.Redis.from_url(
                settings.redis_url,
                socket_timeout=settings.redis_timeout,
                socket_connect_timeout=settings.redis_timeout,
            )
        )
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._look())]

    async def close(self) -> None:
        """Stop listening."""
        await end_tasks(self._tasks)
        if self._redis is not None:
            await self._redis.aclose()

    @asynccontextmanager
    async def answering(
        self, tenant_id: UUID, model: LiveModel, lines: Sequence[StagedLine], *, streams: bool, claim: Claim | None
    ) -> AsyncIterator[LiveAnswer]:
        """Submit lines, whose answers come within the block. What is unfinished at its end is cancelled.

        Where an earlier try of the request is known by `claim`, its answer comes. Raises `Unavailable` where no worker
        serves the model, or too many live requests wait here.
        """
        if not self._has_place():
            raise Unavailable("Too many requests wait for their answers here. Try again, or send a batch.")
        name = model.limits.name
        if not model.is_served:
            raise Unavailable(f"No worker serves {name!r} just now. Send a batch, which waits for one, or try again.")
        job_id = new_id()
        answer = self._waiting[job_id] = LiveAnswer(job_id, len(lines))
        target = orjson.dumps({"live": {"channel": self._channel, "stream": streams}})[1:-1]
        addressed = [
            StagedLine(line.line, line.custom_id, line.prefix, line.body[:-1] + b"," + target + b"}") for line in lines
        ]
        try:
            try:
                await self._services.transaction(live.submit, tenant_id, name, addressed, job_id, claim)
            except AlreadyMade as earlier:
                answer.is_complete = True  # there is nothing to cancel
                async with self._repeated(earlier.object_id, len(lines)) as repeated:
                    yield repeated
                return
            self._services.notifier.notify(name, job_id)
            yield answer
        finally:
            del self._waiting[job_id]
            if not answer.is_complete:
                await asyncio.shield(self._cancel(tenant_id, name, job_id))

    async def queue(
        self, tenant_id: UUID, model: str, lines: Sequence[StagedLine], claim: Claim | None
    ) -> tuple[UUID, bool]:
        """Submit lines as a job at batch priority. Returns its id, and whether this try of the request made it."""
        job_id = new_id()
        try:
            await self._services.transaction(live.submit, tenant_id, model, lines, job_id, claim, is_live=False)
        except AlreadyMade as earlier:
            return earlier.object_id, False
        self._services.notifier.notify(model, job_id)
        return job_id, True

    @asynccontextmanager
    async def queued(
        self, tenant_id: UUID, model: str, lines: Sequence[StagedLine], claim: Claim | None
    ) -> AsyncIterator[LiveAnswer]:
        """The same, whose answers come within the block, each at its end. What is unfinished then is cancelled.

        No worker has to be alive: the job waits for one. Raises `NoPlaceNow` where too many requests wait here.
        """
        if not self._has_place():
            raise NoPlaceNow("Too many requests wait for their answers here. Try again later, or in the background.")
        job_id, is_ours = await self.queue(tenant_id, model, lines, claim)
        async with self._repeated(job_id, len(lines), may_move=True) as answer:
            try:
                yield answer
            finally:
                if is_ours and not answer.is_complete:
                    await asyncio.shield(self._cancel(tenant_id, model, job_id))

    def _has_place(self) -> bool:
        return len(self._waiting) + len(self._repeating) < self._services.settings.max_live_requests

    @asynccontextmanager
    async def _repeated(self, job_id: UUID, num_lines: int, *, may_move: bool = False) -> AsyncIterator[LiveAnswer]:
        answer = LiveAnswer(job_id, num_lines, may_move=may_move)
        await self._look_at([answer])
        self._repeating.add(answer)
        try:
            yield answer
        finally:
            self._repeating.discard(answer)

    async def _cancel(self, tenant_id: UUID, model: str, job_id: UUID) -> None:
        if self._redis is not None:
            # The worker frees its blocks within a step; it would find out from Postgres at its next claim.
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await self._redis.publish(cancel_channel(model), job_id.hex)
        await self._services.quietly(settling.cancel_job, tenant_id, job_id)
        await self._services.quietly(settling.settle_open, job_id, limit=self._services.settings.sweep_chunk)

    async def _listen(self) -> None:
        if self._redis is None:
            return
        is_away = False
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(self._channel)
                    is_away = False
                    while True:
                        message = await channel.get_message(timeout=LOOK)
                        if message is not None:
                            self._take(orjson.loads(message["data"]))
            except (RedisError, OSError, TimeoutError) as error:
                if not is_away:
                    logger.warning("live answers are read from Postgres: %s", type(error).__name__)
                is_away = True
                await asyncio.sleep(PAUSE)

    def _take(self, message: Message) -> None:
        answer = self._waiting.get(UUID(hex=message["job"]))
        if answer is not None:
            answer.put(message)

    async def _look(self) -> None:
        """Find what Redis lost: answers that stand in Postgres, and requests whose worker is gone."""
        while True:
            await asyncio.sleep(LOOK)
            waiting = [*self._waiting.values(), *self._repeating]
            if not waiting:
                continue
            try:
                await self._look_at(waiting)
            except (SQLAlchemyError, psycopg.Error) as error:
                logger.warning("live answers cannot be looked for now: %s", type(error).__name__)

    async def _look_at(self, waiting: Sequence[LiveAnswer]) -> None:
        states = await self._services.transaction(live.states, [answer.job_id for answer in waiting])
        for answer in waiting:
            state = states.get(answer.job_id)
            if state is None:
                continue  # not submitted yet
            if state.has_ended:
                await self._read(answer)
            elif state.has_lost_worker and not answer.may_move:
                answer.fail(WorkerLost())

    async def _read(self, answer: LiveAnswer) -> None:
        results = await self._services.transaction(reading.read_results, answer.job_id, after=0, limit=answer.num_lines)
        for result in results:
            body = orjson.loads(result.body)
            if body["response"] is None:
                answer.fail(Unavailable(body["error"]["message"]))
                return
            epoch = answer.epoch_of(result.line)
            answer.put({"line": result.line, "epoch": epoch, "answer": body})
