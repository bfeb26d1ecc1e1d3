"""One query at a time for all who ask the same kind of question.

A burst of requests would otherwise take every connection of the pool several times over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Batcher(Generic[K, V]):
    """Looks keys up in batches: those that come in during one look are the next one's.

    An answer is never older than its question: a look begins after all of its keys were asked for.
    """

    def __init__(self, look_up: Callable[[Collection[K]], Awaitable[Mapping[K, V]]]) -> None:
        self._look_up = look_up
        self._waiting: dict[K, asyncio.Future[V | None]] = {}
        self._runner: asyncio.Task[None] | None = None

    async def get(self, key: K) -> V | None:
        """The value of a key, or None. Raises what the look raised."""
        loop = asyncio.get_running_loop()
        answer = self._waiting.setdefault(key, loop.create_future())
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        # One caller that hangs up must not take the answer from the others.
        return await asyncio.shield(answer)

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, {}
            try:
                found = await self._look_up(batch.keys())
            except BaseException as error:
                for answer in batch.values():
                    answer.set_exception(error)
                    answer.exception()  # seen, also where every caller has hung up
                if not isinstance(error, Exception):
                    raise
            else:
                for key, answer in batch.items():
                    answer.set_result(found.get(key))
