"""Stored results as lines of a message batch: `{"custom_id", "result": {"type", …}}`."""

from __future__ import annotations

from typing import Any

import orjson

from jobs.queries.reading import StoredResult

_ENDED = {"job_cancelled": "canceled", "job_expired": "expired"}
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def result_line(result: StoredResult) -> bytes:
    """One line, with its end."""
    document = orjson.loads(result.body)
    return orjson.dumps({"custom_id": result.custom_id, "result": _result(document)}) + b"\n"


def _result(document: dict[str, Any]) -> dict[str, Any]:
    response, error = document["response"], document["error"]
    if response is None:
        kind = _ENDED.get(error["code"])
        return {"type": kind} if kind is not None else _errored("api_error", error["message"])
    if response["status_code"] != 200:
        kind = "invalid_request_error" if response["status_code"] < 500 else "api_error"
        return _errored(kind, response["body"]["error"]["message"])
    return {"type": "succeeded", "message": _message(response["body"])}


def _errored(kind: str, message: str) -> dict[str, Any]:
    return {"type": "errored", "error": {"type": "error", "error": {"type": kind, "message": message}}}


def _message(body: dict[str, Any]) -> dict[str, Any]:
    """A completion as a message. The engine does not say which stop string ended a text, nor that one did."""
    choice, usage = body["choices"][0], body["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "id": f"msg_{body['id']}",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": _content(choice.get("message") or {"content": choice.get("text")}),
        "stop_reason": _STOP_REASONS.get(choice["finish_reason"], "end_turn"),
        "stop_sequence": None,
        "usage": {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage["completion_tokens"],
        },
    }


def _content(message: dict[str, Any]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": ""})
    if message.get("content"):
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls") or ():
        function = call["function"]
        blocks.append(
            {
                "type": "tool_use",
                "id": call["id"],
                "name": function["name"],
                "input": orjson.loads(function["arguments"]),
            }
        )
    return blocks
