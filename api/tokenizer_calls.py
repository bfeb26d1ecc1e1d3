"""Questions to the tokenizer of a model, which its workers answer over Redis; `worker.generation.tokenizer_server`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Annotated, Any

import orjson
import redis.asyncio
from fastapi import Depends, Request
from redis.exceptions import RedisError

from api.errors import Unavailable
from jobs.errors import InvalidInput
from jobs.ids import new_id
from jobs.queues import tokenizer_queue, tokenizer_reply
from jobs.settings import Settings

WAIT = 15.0  # seconds for an answer
MOST_WAITING = 64  # questions of one API process; each holds a connection to Redis
QUEUE_EXPIRES = 60  # seconds, where every worker has ended


class QuestionRefused(InvalidInput):
    """The worker refused a question, and says why in a code of its own."""

    def __init__(self, message: str, *, code: str, param: str | None) -> None:
        super().__init__(message, param=param)
        self.code = code


class TokenizerCalls:
    """Asks the workers of a model. Each question waits at a list of its own."""

    def __init__(self, settings: Settings) -> None:
        self._num_waiting = 0
        self._redis = (
            None
            if settings.redis_url is None
            else redis.asyncio.Redis.from_url(
                settings.redis_url,
                socket_timeout=WAIT + settings.redis_timeout,
                socket_connect_timeout=settings.redis_timeout,
            )
        )
        self._timeout = settings.redis_timeout

    async def close(self) -> None:
        """Let connections go."""
        if self._redis is not None:
            await self._redis.aclose()

    async def ask(self, model: str, question: Mapping[str, object]) -> dict[str, Any]:
        """The result of a question. Raises `QuestionRefused`, and `Unavailable` where no worker answers it."""
        if self._redis is None:
            raise Unavailable("Texts are tokenized over Redis, and none is configured.")
        if self._num_waiting >= MOST_WAITING:
            raise Unavailable("Too many texts wait to be tokenized here. Try again.")
        self._num_waiting += 1
        try:
            reply = await self._exchange(self._redis, tokenizer_queue(model), question)
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable("Redis, over which texts are tokenized, is away. Try again.") from error
        finally:
            self._num_waiting -= 1
        if reply is None:
            raise Unavailable(f"No worker of {model!r} answered within {WAIT:g} s. Try again.")
        if "refused" in reply:
            raise QuestionRefused(**reply["refused"])
        if "failed" in reply:
            raise Unavailable(f"The worker could not answer: {reply['failed']}")
        result: dict[str, Any] = reply["result"]
        return result

    async def _exchange(
        self, client: redis.asyncio.Redis, queue: str, question: Mapping[str, object]
    ) -> dict[str, Any] | None:
        key = tokenizer_reply(new_id().hex)
        raw = orjson.dumps({"reply": key, **question})
        async with asyncio.timeout(self._timeout):
            pipeline = client.pipeline(transaction=True)
            pipeline.rpush(queue, raw)
            pipeline.expire(queue, QUEUE_EXPIRES)
            await pipeline.execute()
        taken = None
        try:
            taken = await client.blpop([key], timeout=WAIT)
        finally:
            if taken is None:
                with contextlib.suppress(RedisError, OSError, TimeoutError):
                    await client.lrem(queue, 1, raw)  # type: ignore[arg-type]  # bytes are taken, too
        return None if taken is None else orjson.loads(taken[1])


def _calls(request: Request) -> TokenizerCalls:
    found = request.app.state.tokenizer_calls
    assert isinstance(found, TokenizerCalls)
    return found


InjectedCalls = Annotated[TokenizerCalls, Depends(_calls)]
