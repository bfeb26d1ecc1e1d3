"""Tokens for callers that only want to count or read them: `/tokenize`, `/detokenize`, dry runs.

    API process ──RPUSH tokenize.<model>──▶ any worker of the model ──RPUSH tokenized.<question>──▶ API process

Nothing is stored: a question that Redis loses is asked again. A text that hangs the tokenizer holds up this thread
alone, and the caller's patience ends in the API.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import orjson
import redis

from engine.errors import InvalidPrompt
from jobs.queues import tokenizer_queue
from jobs.requests import ModelLimits
from jobs.settings import Settings
from worker.generation import chat_prompt
from worker.generation.prompts import BEYOND, LARGE_TEXT, PromptTokenizer, begins_beyond
from worker.generation.time_limit import TimeLimitExceeded

logger = logging.getLogger(__name__)

PAUSE = 1.0  # seconds before Redis is tried again
LOOK = 0.5  # seconds between two looks at whether this worker ends
REPLY_EXPIRES = 30  # seconds; the caller is gone by then


class CallersTokenizer(PromptTokenizer, Protocol):
    """The part of `engine.tokenization` that callers may ask."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens."""

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each token."""

    def info(self) -> Mapping[str, Any]:
        """What it is called, and its special tokens."""


class Refused(Exception):
    """The caller has to change the question."""

    def __init__(self, message: str, *, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.reply = {"message": message, "code": code, "param": param}


def answer(tokenizer: CallersTokenizer | None, model: ModelLimits, question: Mapping[str, Any]) -> Mapping[str, object]:
    """The result of one question. Raises `Refused`."""
    if tokenizer is None:
        raise Refused(f"{model.name} has no tokenizer")
    try:
        if "tokens" in question:
            return {"prompt": tokenizer.decode(question["tokens"], skip_special_tokens=False)}
        if "line" in question:
            return _tokens(tokenizer, model, question["line"], with_pieces=question["return_token_strs"])
        if "count" in question:
            return {"counts": [_count(tokenizer, model, line) for line in question["count"]]}
        return dict(tokenizer.info())
    except InvalidPrompt as error:
        raise Refused(error.message) from None
    except TimeLimitExceeded:
        raise Refused(f"the chat template took more than {chat_prompt.TEMPLATE_LIMIT:g} s") from None


def _count(tokenizer: CallersTokenizer, model: ModelLimits, line: Mapping[str, Any]) -> int | None:
    """How many tokens a line has; None where it becomes none."""
    try:
        return len(_encode(tokenizer, model, line))
    except (InvalidPrompt, Refused, TimeLimitExceeded):
        return None


def _tokens(
    tokenizer: CallersTokenizer, model: ModelLimits, line: Mapping[str, Any], *, with_pieces: bool
) -> Mapping[str, object]:
    tokens = _encode(tokenizer, model, line)
    return {"tokens": tokens, "pieces": tokenizer.pieces(tokens) if with_pieces else None}


def _encode(tokenizer: CallersTokenizer, model: ModelLimits, line: Mapping[str, Any]) -> list[int]:
    """Tokens of a line as the API stores lines, which are those that it would run with."""
    is_chat = "messages" in line
    text = chat_prompt.render(tokenizer, line)[0] if is_chat else line["prompt"]
    adds = line.get("add_special_tokens", not is_chat)
    limit = BEYOND * model.max_model_len
    if len(text) > max(LARGE_TEXT, limit) and (
        tokenizer.least_tokens(text) > limit
        or begins_beyond(text, model.max_model_len, tokenizer, add_special_tokens=adds)
    ):
        raise Refused(
            f"more than {limit} tokens, {BEYOND} times the context of {model.name}",
            code="context_length_exceeded",
            param="messages" if is_chat else "prompt",
        )
    (tokens,) = tokenizer.encode_batch([text], add_special_tokens=adds)
    if isinstance(tokens, InvalidPrompt):
        raise tokens
    return tokens


class TokenizerServer:
    """Answers questions on a thread of its own, one at a time."""

    def __init__(self, settings: Settings, *, tokenizer: Callable[[str], CallersTokenizer | None]) -> None:
        """`tokenizer` gives a model's; None where it has none."""
        self._tokenizer = tokenizer
        self._models: dict[str, ModelLimits] = {}  # by their queues
        self._closing = threading.Event()
        self._client: redis.Redis | None = None
        if settings.redis_url is not None:
            self._client = redis.Redis.from_url(
                settings.redis_url,
                socket_timeout=LOOK + settings.redis_timeout,
                socket_connect_timeout=settings.redis_timeout,
            )
        self._thread = threading.Thread(target=self._serve, name="tokenizer", daemon=True)

    def start(self, models: Sequence[ModelLimits]) -> None:
        """Begin to take questions about models, which were all loaded once."""
        self._models = {tokenizer_queue(model.name): model for model in models}
        if self._client is not None:
            self._thread.start()

    def close(self) -> None:
        """Take no further question, and end the one that is being answered."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * LOOK)

    def _serve(self) -> None:
        assert self._client is not None
        queues = list(self._models)
        is_away = False
        while not self._closing.is_set():
            try:
                taken = self._client.blpop(queues, timeout=LOOK)
                is_away = False
                if isinstance(taken, list | tuple):
                    self._answer(self._client, self._models[_text(taken[0])], taken[1])
            except redis.RedisError as error:
                if not is_away:
                    logger.warning("callers' texts are not tokenized here now: %s", type(error).__name__)
                is_away = True
                self._closing.wait(PAUSE)

    def _answer(self, client: redis.Redis, model: ModelLimits, raw: bytes | str) -> None:
        try:
            question = orjson.loads(raw)
            key = question["reply"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            logger.error("a question to the tokenizer is not what the API writes")
            return
        reply: dict[str, object]
        try:
            reply = {"result": answer(self._tokenizer(model.name), model, question)}
        except Refused as refused:
            reply = {"refused": refused.reply}
        except Exception as error:  # noqa: BLE001 - one question must not end this thread
            kind = type(error).__name__  # the message may quote the text
            logger.error("a caller's text cannot be tokenized: %s", kind)
            reply = {"failed": kind}
        pipeline = client.pipeline(transaction=True)
        pipeline.rpush(key, orjson.dumps(reply))
        pipeline.expire(key, REPLY_EXPIRES)
        pipeline.execute()


def _text(key: bytes | str) -> str:
    return key.decode() if isinstance(key, bytes) else key
