"""Server-sent events of a live answer, as OpenAI's clients read them.

data: {chunk with the role}      one a choice, chat only
data: {chunk with text} …
data: {chunk with finish_reason}
data: {chunk with usage, no choices}      where `stream_options.include_usage` asks for it
data: [DONE]
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import ClientDisconnect

from api.errors import problem, unexpected
from api.openai.live_hub import Message

KEEP_ALIVE = 15.0  # seconds without an event; proxies cut silent connections
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class StreamShape:
    """What all chunks of a stream have in common. `n` choices a line."""

    id: str
    model: str
    created: int
    fingerprint: str
    is_chat: bool
    n: int
    num_lines: int
    wants_usage: bool
    wants_running_usage: bool
    service_tier: str = "default"
    usage: dict[str, Any] = field(default_factory=dict)
    num_calls: dict[int, int] = field(default_factory=dict)
    """Calls of tools, by choice, that were said."""

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        """One event."""
        document: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk" if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }
        if self.wants_usage or self.wants_running_usage:
            document["usage"] = usage
        return b"data: " + orjson.dumps(document) + b"\n\n"

    def opening(self) -> bytes:
        """The role of each choice, in their order; nothing in a legacy completion."""
        if not self.is_chat:
            return b""
        return b"".join(
            self.chunk([_choice(index, {"delta": {"role": "assistant", "content": ""}})])
            for index in range(self.n * self.num_lines)
        )

    def events(self, message: Message) -> bytes:
        """What a message brings."""
        first = (message["line"] - 1) * self.n
        events = b"".join(self._delta(first, delta) for delta in message.get("deltas", ()))
        answer = message.get("answer")
        if answer is not None:
            body = answer["response"]["body"]
            add_usage(self.usage, body["usage"])
            if "deltas" not in message:
                # Nothing was streamed of it: all comes at once.
                for choice in body["choices"]:
                    events += self._delta(first, choice | choice.get("message", {}))
        return events

    def _delta(self, first: int, delta: dict[str, Any]) -> bytes:
        index = first + delta["index"]
        reason, logprobs = delta.get("finish_reason"), delta.get("logprobs")
        if not self.is_chat:
            return self.chunk([_choice(index, {"text": delta.get("text", "")}, reason, logprobs)])
        said = [{name: delta[name]} for name in ("reasoning_content", "content") if delta.get(name)]
        for call in delta.get("tool_calls") or ():
            said += self._call(index, call)
        if logprobs and not said:
            said.append({"content": ""})
        # Log-probabilities are those of all that a delta says; they stand once.
        events = b"".join(
            self.chunk([_choice(index, {"delta": each}, None, logprobs if place == 0 else None)])
            for place, each in enumerate(said)
        )
        return events + (self.chunk([_choice(index, {"delta": {}}, reason)]) if reason is not None else b"")

    def _call(self, choice: int, call: dict[str, Any]) -> list[dict[str, Any]]:
        """A call in two pieces: its name, and its arguments. Clients join what comes twice."""
        number = self.num_calls.get(choice, 0)
        self.num_calls[choice] = number + 1
        function = call["function"]
        head = {**call, "index": number, "function": {**function, "arguments": ""}}
        tail = {"index": number, "function": {"arguments": function["arguments"]}}
        return [{"tool_calls": [head]}, {"tool_calls": [tail]}]


def _choice(
    index: int, said: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}


def add_usage(total: dict[str, Any], usage: dict[str, Any]) -> None:
    """Add the counts of one line to those of all."""
    for name, value in usage.items():
        if isinstance(value, dict):
            add_usage(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value


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
    messages: AsyncIterator[Message], shape: StreamShape, leaving: asyncio.Future[None]
) -> AsyncIterator[bytes]:
    """All events of a stream. An error after the first is an event of its own, and ends it.

    Once `leaving` is done the stream ends without `[DONE]`, because a caller that reads on must not take it for whole.
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
        if shape.wants_usage:
            yield shape.chunk([], shape.usage)
    except ClientDisconnect:
        return
    except AnswerRefused as refused:
        yield b"data: " + orjson.dumps(refused.body) + b"\n\n"
    except Exception as error:  # noqa: BLE001 - the headers are gone: the stream itself says it
        yield b"data: " + (problem(error) or unexpected()).content + b"\n\n"
    yield DONE


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
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await coming
