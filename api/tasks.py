"""Tasks that run beside the requests, from the start of the process to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

AGAIN = 1.0  # seconds between two cancellations


async def end_tasks(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks until all have ended. What they raised is dropped.

    One cancellation is not enough, because a library can lose it: redis-py does while it connects.
    """
    ending = list(tasks)
    running = set(ending)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=AGAIN)
    await asyncio.gather(*ending, return_exceptions=True)
