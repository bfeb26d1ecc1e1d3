"""Answers of live requests on their way to the API process whose caller waits, over Redis.

    engine thread   progress ──▶ text that is sure ─┐
    any thread      outcome  ──▶ the whole answer   ─┴▶ queue ──publisher thread──▶ PUBLISH live.<process>

Postgres holds the answer as it does for every request; a message that is lost is found there.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson
import redis

from engine import CompletionProgress
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import ClaimToken, Outcome
from jobs.queues import cancel_channel
from jobs.settings import Settings
from worker.generation.answer_parts import AnswerForm, AnswerParts
from worker.generation.logprobs import TokenTexts, openai_logprobs
from worker.generation.text_stream import Decode, TextStream

logger = logging.getLogger(__name__)

PAUSE = 1.0  # seconds before Redis is tried again
_MOST_AT_ONCE = 256  # messages in one pipeline


@dataclass(slots=True)
class _Choice:
    text: TextStream
    parts: AnswerParts | None
    """Of a chat."""
    num_given: dict[str, int] = field(default_factory=dict)
    """Characters of the message's texts, and its calls, that were published."""
    num_logprobs: int = 0
    is_ended: bool = False

    def said(self, text: str) -> dict[str, object]:
        """What a piece of text adds to the delta; nothing where it is held back."""
        if self.parts is None:
            return {"text": text} if text else {}
        self.parts.feed(text)
        if self.is_ended:
            self.parts.end()
        return self.unsaid(self.parts.message())

    def unsaid(self, message: Mapping[str, Any]) -> dict[str, object]:
        """What of a message was not published yet."""
        delta: dict[str, object] = {}
        for name in ("reasoning_content", "content", "tool_calls"):
            value = message.get(name)
            if value and len(value) > (given := self.num_given.get(name, 0)):
                delta[name] = value[given:]
                self.num_given[name] = len(value)
        return delta


@dataclass(slots=True)
class _Open:
    """A live request that this worker holds."""

    channel: str
    streams: bool
    name: str
    choices: list[_Choice] = field(default_factory=list)


class LiveAnswers:
    """Publishes the tokens and outcomes of live requests. `on_cancel` is told the job whose caller hung up."""

    def __init__(self, settings: Settings, *, models: Sequence[str], on_cancel: Callable[[UUID], None]) -> None:
        self._models = models
        self._on_cancel = on_cancel
        self._open: dict[ClaimToken, _Open] = {}
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[str, bytes] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._client: redis.Redis | None = None
        if settings.redis_url is not None:
            self._client = redis.Redis.from_url(
                settings.redis_url,
                socket_timeout=settings.redis_timeout,
                socket_connect_timeout=settings.redis_timeout,
            )
        self._threads = [
            threading.Thread(target=self._publish, name="live answers", daemon=True),
            threading.Thread(target=self._listen, name="live cancels", daemon=True),
        ]

    def start(self) -> None:
        if self._client is not None:
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """Publish what is queued, and end."""
        self._closing.set()
        self._queue.put(None)
        if self._client is not None and self._threads[0].is_alive():
            self._threads[0].join(timeout=PAUSE)

    def open(self, requests: Sequence[ClaimedRequest]) -> None:
        """Expect the answers of those requests that are live."""
        for request in requests:
            target = _target(request.body) if request.is_live else None
            if target is not None:
                with self._lock:
                    self._open[request.token] = _Open(str(target["channel"]), bool(target.get("stream")), request.name)

    def forget(self, requests: Sequence[ClaimedRequest]) -> None:
        """Publish nothing more of these."""
        with self._lock:
            for request in requests:
                self._open.pop(request.token, None)

    def is_streaming(self, token: ClaimToken) -> bool:
        """Whether a request's tokens are wanted before its end."""
        with self._lock:
            found = self._open.get(token)
        return found is not None and found.streams

    def progress(
        self,
        token: ClaimToken,
        progress: Sequence[CompletionProgress],
        *,
        decode: Decode,
        tokens: TokenTexts | None,
        stop: Sequence[str],
        form: AnswerForm | None,
        wants_logprobs: bool,
    ) -> None:
        """Publish what is new of an unfinished request. `form` is that of a chat."""
        with self._lock:
            found = self._open.get(token)
        if found is None:
            return
        while len(found.choices) < len(progress):
            name = f"{found.name} {len(found.choices)}"
            found.choices.append(_Choice(TextStream(decode, stop), None if form is None else AnswerParts(form, name)))
        deltas = []
        for index, (choice, now) in enumerate(zip(found.choices, progress, strict=True)):
            if choice.is_ended:
                continue
            before = choice.text.num_given
            if now.completion is None:
                text = choice.text.feed(now.token_ids)
            else:
                text, choice.is_ended = choice.text.finish(now.completion.text), True
            delta: dict[str, object] = {"index": index, **choice.said(text)}
            new = now.logprobs[choice.num_logprobs :]
            if wants_logprobs and new:
                choice.num_logprobs = len(now.logprobs)
                delta["logprobs"] = _shifted(openai_logprobs(new, text, tokens, is_chat=form is not None), before)
            if now.completion is not None:
                reason = now.completion.finish_reason
                delta["finish_reason"] = reason if choice.parts is None else choice.parts.finish_reason(reason)
            if len(delta) > 1:
                deltas.append(delta)
        if deltas:
            self._put(found.channel, token, {"deltas": deltas})

    def finish(self, outcome: Outcome) -> None:
        """Publish a request's outcome, if it is live; what its stream was not given yet goes first."""
        token = outcome.token
        with self._lock:
            found = self._open.pop(token, None)
        if found is None:
            return
        answer = orjson.loads(outcome.body)
        message: dict[str, Any] = {"answer": answer}
        if found.choices and answer["response"]["status_code"] == 200:
            message["deltas"] = list(_rest(found, answer["response"]["body"]["choices"]))
        self._put(found.channel, token, message)

    def _put(self, channel: str, token: ClaimToken, message: Mapping[str, object]) -> None:
        head = {"job": token.job_id.hex, "line": token.line, "epoch": token.epoch}
        self._queue.put((channel, orjson.dumps({**head, **message})))

    def _publish(self) -> None:
        assert self._client is not None
        is_away = False
        while (first := self._queue.get()) is not None:
            messages = [first]
            while len(messages) < _MOST_AT_ONCE and not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    self._queue.put(None)
                    break
                messages.append(more)
            try:
                pipeline = self._client.pipeline(transaction=False)
                for channel, message in messages:
                    pipeline.publish(channel, message)
                pipeline.execute()
                is_away = False
            except redis.RedisError as error:
                if not is_away:
                    logger.warning("live answers go through Postgres alone: %s", type(error).__name__)
                is_away = True

    def _listen(self) -> None:
        assert self._client is not None
        while not self._closing.is_set():
            try:
                with self._client.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
                    channel.subscribe(*(cancel_channel(model) for model in self._models))
                    while not self._closing.is_set():
                        message = channel.get_message(timeout=PAUSE)
                        if message is not None:
                            self._cancel(message["data"])
            except redis.RedisError:
                self._closing.wait(PAUSE)

    def _cancel(self, data: object) -> None:
        try:
            job_id = UUID(hex=data.decode()) if isinstance(data, bytes) else None
        except ValueError:
            return
        if job_id is not None:
            self._on_cancel(job_id)


def _target(body: bytes) -> Mapping[str, object] | None:
    try:
        target = orjson.loads(body).get("live")
    except (orjson.JSONDecodeError, AttributeError):
        return None
    return target if isinstance(target, dict) and "channel" in target else None


def _shifted(logprobs: Mapping[str, object], by: int) -> Mapping[str, object]:
    """Offsets of a piece as offsets of the whole text."""
    offsets = logprobs.get("text_offset")
    if not isinstance(offsets, list):
        return logprobs
    return {**logprobs, "text_offset": [offset + by for offset in offsets]}


def _rest(found: _Open, choices: Sequence[Mapping[str, Any]]) -> Sequence[dict[str, object]]:
    """The last piece of each choice: text, log-probabilities and finish reason."""
    deltas: list[dict[str, object]] = []
    for choice, whole in zip(found.choices, choices, strict=True):
        if choice.is_ended:
            continue
        said = choice.unsaid(whole["message"]) if "message" in whole else {"text": choice.text.finish(whole["text"])}
        delta: dict[str, object] = {"index": whole["index"], **said, "finish_reason": whole["finish_reason"]}
        logprobs = whole["logprobs"]
        if logprobs is not None:
            delta["logprobs"] = {
                name: values[choice.num_logprobs :] if isinstance(values, list) else values
                for name, values in logprobs.items()
            }
        deltas.append(delta)
    return deltas
