"""Whether Redis takes notifications: one look at a time, shared by every request that asks."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

RedisState = Literal["ok", "unreachable", "refuses writes"]

PATIENCE = 1.0  # seconds that a request waits for a look; compose.yaml gives /readyz 3 s
FRESH = 1.0  # seconds that a look holds for
KEY = "pagemill.readiness"


class RedisProbe:
    """Writes to Redis as a notification does: a replica, or a server out of memory, answers a PING all the same."""

    def __init__(self, broker: Celery) -> None:
        self._broker = broker
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="redis-probe")
        self._look: asyncio.Task[RedisState] | None = None
        self._ended_at = float("-inf")

    async def state(self) -> RedisState:
        """What Redis is good for. Returns within `PATIENCE`, also where it is frozen."""
        look = self._look
        if look is None or (look.done() and time.monotonic() - self._ended_at > FRESH):
            look = self._look = asyncio.get_running_loop().create_task(self._look_now())
        try:
            async with asyncio.timeout(PATIENCE):
                return await asyncio.shield(look)
        except TimeoutError:
            return "unreachable"

    async def _look_now(self) -> RedisState:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._write)
        finally:
            self._ended_at = time.monotonic()

    def _write(self) -> RedisState:
        try:
            with self._broker.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0)
                connection.default_channel.client.set(KEY, "1", ex=60)
        except (OperationalError, RedisConnectionError, OSError):
            return "unreachable"
        except (ResponseError, RedisError):
            return "refuses writes"
        return "ok"

    def close(self) -> None:
        """Let a look that is under way end by itself."""
        if self._look is not None:
            self._look.cancel()
        self._thread.shutdown(wait=False)
