"""Server-sent events of a live answer, in the shape of its endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import orjson
from starlette.requests import ClientDisconnect

from api.errors import problem, unexpected
from api.openai.live_hub import Message

KEEP_ALIVE = 15.0  # seconds without an event; proxies cut silent connections


class AnswerShape(Protocol):
    """How an endpoint tells an answer. Events are whole server-sent events, or nothing."""

    def opening(self) -> bytes:
        """Events before the first message."""

    def events(self, message: Message) -> bytes:
        """What a message brings; no line of it is an error."""

    def ending(self) -> bytes:
        """Events after the last message."""

    def failure(self, error: Mapping[str, Any]) -> bytes:
        """Events that end a stream by `{"error": …}`."""

    def whole(self, bodies: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """The answer without a stream, from the bodies of its lines."""


class AnswerRefused(Exception):
    """A line's answer is an error: its status and its body."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(status)
        self.status, self.body = status, body


def require_success(message: Message) -> None:
    """Raise `AnswerRefused` where a message ends its line with an error."""
    answer = message.get("answer")
    if answer is not None and answer["response"]["status_code"] != 200:
        raise AnswerRefused(answer["response"]["status_code"], answer["response"]["body"])


async def stream(
    messages: AsyncIterator[Message], shape: AnswerShape, leaving: asyncio.Future[None]
) -> AsyncIterator[bytes]:
    """All events of a stream. An error after the first is an event of its own, and ends it.

    Once `leaving` is done the stream has no ending, because a caller that reads on must not take it for whole.
    """
    yield shape.opening()
    try:
        async for message in with_pauses(messages, leaving):
            if message is None:
                yield b": keep-alive\n\n"
                continue
            require_success(message)
            if events := shape.events(message):
                yield events
        yield shape.ending()
    except ClientDisconnect:
        return
    except AnswerRefused as refused:
        yield shape.failure(refused.body)
    except Exception as error:  # noqa: BLE001 - the headers are gone: the stream itself says it
        yield shape.failure(orjson.loads((problem(error) or unexpected()).content))


async def with_pauses(messages: AsyncIterator[Message], leaving: asyncio.Future[None]) -> AsyncIterator[Message | None]:
    """Messages, and None after each `KEEP_ALIVE` seconds without one. Raises `ClientDisconnect` after `leaving`."""
    coming: asyncio.Future[Message] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(messages))
            either: list[asyncio.Future[Any]] = [coming, leaving]
            await asyncio.wait(either, timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                raise ClientDisconnect
            if not coming.done():
                yield None
                continue
            try:
                message = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield message
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
