"""Transactions of the API, begun in the order in which they were asked for.

SQLAlchemy's pool gives a connection that comes back to whichever task asks next, so that in a burst of requests one
that waits can be passed over until its time is up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.ext.asyncio import AsyncEngine

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 30.0  # seconds in the queue; a burst of requests is worth the wait, and a frozen Postgres is noticed before


class Transactions:
    """One queue of callers before the `places` connections of a pool that nothing else uses."""

    def __init__(self, database: AsyncEngine, places: int) -> None:
        self.database = database
        self._places = asyncio.Semaphore(places)  # first come, first served

    async def run(self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run one query in a transaction of its own. It is committed when this returns.

        Raises `sqlalchemy.exc.TimeoutError` after `PATIENCE` in the queue.
        """
        try:
            async with asyncio.timeout(PATIENCE):
                await self._places.acquire()
        except TimeoutError:
            raise NoConnection(f"no connection was free for {PATIENCE:g} s") from None
        try:
            async with self.database.begin() as connection:
                return await connection.run_sync(query, *args, **kwargs)
        finally:
            self._places.release()

    async def close(self) -> None:
        """Close the connections."""
        await self.database.dispose()
