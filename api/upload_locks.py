"""Uploads that hold an Idempotency-Key: proof, for other requests and other API processes, that they still live.

All of a process's uploads share one session of Postgres, which holds an advisory lock for each. When the process dies,
however it dies, the session ends and the locks with it: a request that waits for the key sees that at its next look.
A lock needs a session but no transaction, so that nothing stays open while a body comes in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from uuid import UUID

import psycopg

from api.errors import Unavailable
from api.tasks import end_tasks
from jobs.database import connect_session
from jobs.queries.submission import upload_lock
from jobs.settings import Settings

logger = logging.getLogger(__name__)

RECONNECT = 0.2  # seconds; far less than what a waiting request allows for a session that was lost
PATIENCE = 10.0  # seconds for a lock, the connection included


class UploadLocks:
    """The advisory locks of this process's uploads. They are taken again when their session was lost.

    Nothing is connected before the first upload with a key.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._wanted: dict[UUID, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def lock(self, job_id: UUID) -> AsyncGenerator[None]:
        """Hold the lock of an upload into `job_id` until the block ends. Raises `Unavailable` if it cannot."""
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._keep())
        held = self._wanted[job_id] = asyncio.Event()
        self._changed.set()
        try:
            try:
                async with asyncio.timeout(PATIENCE):
                    await held.wait()
            except TimeoutError:
                raise Unavailable("The database is not available just now.") from None
            yield
        finally:
            del self._wanted[job_id]
            self._changed.set()

    async def close(self) -> None:
        """End the session, and every lock with it."""
        if self._keeper is not None:
            await end_tasks([self._keeper])

    async def _keep(self) -> None:
        while True:
            try:
                async with await connect_session(self._settings, "pagemill-api-uploads") as session:
                    await self._follow(session)
            except (psycopg.Error, OSError) as error:
                logger.warning("The session that keeps the uploads' locks is lost: %s", type(error).__name__)
            await asyncio.sleep(RECONNECT)

    async def _follow(self, session: psycopg.AsyncConnection) -> None:
        """Hold exactly the locks that are wanted, until the session breaks."""
        held: set[UUID] = set()
        while True:
            self._changed.clear()
            wanted = set(self._wanted)
            await session.execute(
                "SELECT count(pg_advisory_unlock(key)) FROM unnest(%s::bigint[]) AS key", [_keys(held - wanted)]
            )
            await session.execute(
                "SELECT count(pg_advisory_lock(key)) FROM unnest(%s::bigint[]) AS key", [_keys(wanted - held)]
            )
            held = wanted
            for job_id in held & self._wanted.keys():
                self._wanted[job_id].set()
            await self._sleep(session)

    async def _sleep(self, session: psycopg.AsyncConnection) -> None:
        """Until other locks are wanted, or the server says something unasked: goodbye, as a rule."""
        loop = asyncio.get_running_loop()
        loop.add_reader(session.fileno(), self._changed.set)
        try:
            await self._changed.wait()
        finally:
            loop.remove_reader(session.fileno())


def _keys(job_ids: Collection[UUID]) -> list[int]:
    return [upload_lock(job_id) for job_id in job_ids]
