"""The notifier: after a commit, a message on Redis wakes the model's workers.

It never makes a request wait or fail. A lost notification costs the job one poll interval of a worker, so every error
here is counted and logged, and that is all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from celery import Celery

from api.redis_probe import RedisProbe
from jobs.ids import JOB_PREFIX, public_id
from jobs.queues import DRAIN_TASK, celery_config, model_queue
from jobs.settings import Settings

logger = logging.getLogger(__name__)

LOG_INTERVAL = 30.0  # seconds between two warnings about the same dead Redis


class Notifier:
    """A Celery producer on a thread of its own. Make it, use it and close it inside one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._app = Celery("pagemill-api", set_as_current=False)
        self._app.conf.update(celery_config(settings))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="notifier")
        # The newest unannounced job of each model: under a slow Redis notifications merge instead of queueing.
        self._waiting: dict[str, UUID] = {}
        self._sender: asyncio.Task[None] | None = None
        self._warned_at = float("-inf")
        self.probe = RedisProbe(self._app)
        self.sent = 0
        self.failed = 0

    def notify(self, model: str, job_id: UUID) -> None:
        """Wake the workers of `model`, soon. Returns at once."""
        self._waiting[model] = job_id
        if self._sender is None or self._sender.done():
            self._sender = asyncio.get_running_loop().create_task(self._send_all())

    async def _send_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            model, job_id = self._waiting.popitem()
            try:
                await loop.run_in_executor(self._thread, self._send, model, job_id)
            except Exception as error:  # noqa: BLE001  the job is stored, and polling finds it
                self.failed += 1
                self._warn(error)
            else:
                self.sent += 1

    def _send(self, model: str, job_id: UUID) -> None:
        self._app.send_task(
            DRAIN_TASK,
            args=[public_id(JOB_PREFIX, job_id)],
            queue=model_queue(model),
            ignore_result=True,
            retry=False,
        )

    def _warn(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._warned_at >= LOG_INTERVAL:
            self._warned_at = now
            logger.warning(
                "Redis does not answer (%s, %d notifications lost so far): jobs start at the workers' next poll",
                type(error).__name__,
                self.failed,
            )

    async def close(self) -> None:
        """Send what still waits, then end the thread. A dead Redis holds this up for one timeout."""
        if self._sender is not None:
            await self._sender
        self.probe.close()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._app.close)
        self._thread.shutdown(wait=False)
