"""Result lines of finished requests: OpenAI's completion objects inside a line's `response`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from jobs.fingerprints import Failure
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import Outcome
from jobs.states import RequestState


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` completions of a prompt: its text, or in a chat its message."""

    said: str | Mapping[str, object]
    finish_reason: str
    logprobs: Mapping[str, object] | None = None
    """In the shape of the answer's kind; see `worker.generation.logprobs`."""

    def document(self, index: int) -> dict[str, object]:
        """As it stands in `choices`."""
        said = {"text": self.said} if isinstance(self.said, str) else {"message": self.said}
        return {"index": index, "finish_reason": self.finish_reason, "logprobs": self.logprobs} | said


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prompt came to. Its tokens are counted once, those of all choices together."""

    choices: Sequence[Choice]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    """Of `completion_tokens`."""


def completed(request: ClaimedRequest, model: str, answer: Answer, *, is_chat: bool) -> Outcome:
    """The outcome of a request that came to its end."""
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request.name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice.document(index) for index, choice in enumerate(answer.choices)],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        },
    }
    return Outcome(
        request.token,
        RequestState.COMPLETED,
        _response(request, 200, body),
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        completion_tokens=answer.completion_tokens,
        is_truncated=any(choice.finish_reason == "length" for choice in answer.choices),
    )


def refused(request: ClaimedRequest, message: str, *, code: str, param: str | None = None) -> Outcome:
    """The outcome of a request that the caller has to change: its prompt is too long, its template fails."""
    return _failed(request, 400, message, kind="invalid_request_error", code=code, param=param)


def broken(request: ClaimedRequest, message: str) -> Outcome:
    """The outcome of a request that was accepted and then could not be finished."""
    return _failed(request, 500, message, kind="server_error", code="generation_failed")


def _failed(
    request: ClaimedRequest, status: int, message: str, *, kind: str, code: str, param: str | None = None
) -> Outcome:
    error = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return Outcome(
        request.token,
        RequestState.FAILED,
        _response(request, status, error),
        failure=Failure.of(code, message),
    )


def _response(request: ClaimedRequest, status: int, body: Mapping[str, object]) -> bytes:
    response = {"status_code": status, "request_id": f"req_{request.name}", "body": body}
    return orjson.dumps({"response": response, "error": None})
