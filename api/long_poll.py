"""Long polls: many callers wait for the ends of many jobs, one query at a time asks for all of them.

A waiting caller holds no connection. Without waiting callers no query is made.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection
from uuid import UUID

logger = logging.getLogger(__name__)

INTERVAL = 0.2  # seconds between two looks

FindEnded = Callable[[Collection[UUID]], Awaitable[Collection[UUID]]]


class JobWatch:
    """Wake the callers that wait for a job's end. `find_ended` picks, out of some job ids, those no longer running."""

    def __init__(self, find_ended: FindEnded) -> None:
        self._find_ended = find_ended
        self._waiting: dict[UUID, set[asyncio.Event]] = defaultdict(set)
        self._looker: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether the server stops: nothing is waited for any more."""
        return self._is_closed

    async def wait(self, job_id: UUID, seconds: float) -> None:
        """Return when the job may be at its end, or after `seconds`."""
        if self._is_closed:
            return
        woken = asyncio.Event()
        self._waiting[job_id].add(woken)
        if self._looker is None or self._looker.done():
            self._looker = asyncio.get_running_loop().create_task(self._look())
        try:
            async with asyncio.timeout(seconds):
                await woken.wait()
        except TimeoutError:
            return
        finally:
            waiting = self._waiting[job_id]
            waiting.discard(woken)
            if not waiting:
                del self._waiting[job_id]

    async def _look(self) -> None:
        while self._waiting:
            await asyncio.sleep(INTERVAL)
            try:
                ended = await self._find_ended(list(self._waiting))
            except Exception as error:  # noqa: BLE001  the waiting requests ask the database themselves, and answer with its error
                logger.warning("Cannot look for ended jobs: %s", type(error).__name__)
                ended = list(self._waiting)
            for job_id in ended:
                self._wake(job_id)

    def _wake(self, job_id: UUID) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()

    def close(self) -> None:
        """Wake every caller: the server stops, and a long poll may not hold it up."""
        self._is_closed = True
        for job_id in list(self._waiting):
            self._wake(job_id)
