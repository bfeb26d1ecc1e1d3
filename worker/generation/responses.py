"""Result lines of finished requests: OpenAI's completion objects inside a line's `response`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import Outcome
from jobs.states import RequestState


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion as the engine made it."""

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    logprobs: Mapping[str, object] | None = None
    """In the shape of the answer's kind; see `worker.generation.logprobs`."""


def completed(request: ClaimedRequest, model: str, answer: Answer, *, is_chat: bool) -> Outcome:
    """The outcome of a request that came to its end."""
    choice: dict[str, object] = {"index": 0, "finish_reason": answer.finish_reason}
    if is_chat:
        choice["message"] = {"role": "assistant", "content": answer.text}
    else:
        choice["text"] = answer.text
    choice["logprobs"] = answer.logprobs
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request.name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        },
    }
    return Outcome(
        request.token,
        RequestState.COMPLETED,
        _response(request, 200, body),
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        completion_tokens=answer.completion_tokens,
    )


def refused(request: ClaimedRequest, message: str, *, code: str) -> Outcome:
    """The outcome of a request that only the worker could refuse: its prompt is too long, its template fails."""
    return _failed(request, 400, message, kind="invalid_request_error", code=code)


def broken(request: ClaimedRequest, message: str) -> Outcome:
    """The outcome of a request that was accepted and then could not be finished."""
    return _failed(request, 500, message, kind="server_error", code="generation_failed")


def _failed(request: ClaimedRequest, status: int, message: str, *, kind: str, code: str) -> Outcome:
    error = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Outcome(
        request.token,
        RequestState.FAILED,
        _response(request, status, error),
    )


def _response(request: ClaimedRequest, status: int, body: Mapping[str, object]) -> bytes:
    response = {"status_code": status, "request_id": f"req_{request.name}", "body": body}
    return orjson.dumps({"response": response, "error": None})
