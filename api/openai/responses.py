"""Answers of `/v1/responses`, whole and as the events that OpenAI's clients read.

response.created, .in_progress
    .output_item.added, .content_part.added, .output_text.delta …, .done, .content_part.done, .output_item.done
    .output_item.added, .function_call_arguments.delta, .done, .output_item.done
response.completed, .incomplete or .failed

Items stand in the order of their first events, and one ends before the next begins. Text after a call begins another
message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from api.openai.live_hub import Message


@dataclass(slots=True)
class ResponseShape:
    """One response while it comes into being. `name` is unique in the service; ids are made from it."""

    name: str
    model: str
    created: int
    service_tier: str
    repeated: Mapping[str, Any]
    """What it repeats of its request."""
    _output: list[dict[str, Any]] = field(default_factory=list)
    _open: dict[str, int] = field(default_factory=dict)
    """Places of the items that grow, by their type."""
    _num_events: int = 0
    _finish_reason: str = "stop"
    _logprobs: list[dict[str, Any]] = field(default_factory=list)
    """Of tokens whose text has not come."""
    _usage: Mapping[str, Any] | None = None

    def opening(self) -> bytes:
        begun = self.document("in_progress")
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def events(self, message: Message) -> bytes:
        events = b"".join(self._delta(delta) for delta in message.get("deltas", ()))
        answer = message.get("answer")
        if answer is not None:
            body = answer["response"]["body"]
            self._usage = _usage(body["usage"])
            if "deltas" not in message:
                # Nothing was streamed of it: all comes at once.
                events += self._delta(_whole_delta(body))
        return events

    def ending(self) -> bytes:
        events = b"" if self._output else self._add(self._empty("message"))
        for kind in list(self._open):
            events += self._end(kind)
        status = self._status
        return events + self._event(f"response.{status}", response=self.document(status))

    def failure(self, error: Mapping[str, Any]) -> bytes:
        said = error["error"]
        code = "invalid_prompt" if said["type"] == "invalid_request_error" else "server_error"
        failed = self.document("failed") | {"error": {"code": code, "message": said["message"]}}
        return self._event("response.failed", response=failed)

    def whole(self, bodies: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        (body,) = bodies.values()
        self._usage = _usage(body["usage"])
        self._delta(_whole_delta(body))
        self.ending()
        return self.document(self._status)

    def document(self, status: str) -> dict[str, Any]:
        """The response as it stands."""
        return {
            "id": f"resp_{self.name}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "output": [dict(item) for item in self._output],
            "previous_response_id": None,
            "service_tier": self.service_tier,
            "store": False,
            "truncation": "disabled",
            "usage": self._usage,
            **self.repeated,
        }

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        """What a piece of a chat completion's message brings."""
        self._finish_reason = delta.get("finish_reason") or self._finish_reason
        self._logprobs += (delta.get("logprobs") or {}).get("content") or []
        events = b""
        if delta.get("reasoning_content"):
            events += self._grow("reasoning", delta["reasoning_content"])
        if delta.get("content"):
            events += self._end("reasoning") + self._grow("message", delta["content"])
        for call in delta.get("tool_calls") or ():
            events += self._end("reasoning") + self._end("message") + self._call(call)
        return events

    def _add(self, item: dict[str, Any]) -> bytes:
        """Begin an item; what it holds comes with later events."""
        place = self._open[item["type"]] = len(self._output)
        item["status"] = "in_progress"
        self._output.append(item)
        empty = item | ({"content": []} if "content" in item else {})
        events = self._event("response.output_item.added", output_index=place, item=empty)
        for part in item.get("content", ()):
            events += self._event("response.content_part.added", **self._at(place, 0), part=part)
        return events

    def _end(self, kind: str) -> bytes:
        """End the item of that type, if one is open."""
        if kind not in self._open:
            return b""
        place = self._open.pop(kind)
        item = self._output[place]
        is_cut = kind != "function_call" and self._status == "incomplete"
        item["status"] = "incomplete" if is_cut else "completed"
        events = b""
        for part in item.get("content", ()):
            self._take_logprobs(part)
            logprobs = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            at = self._at(place, 0)
            events += self._event(f"response.{part['type']}.done", **at, text=part["text"], **logprobs)
            events += self._event("response.content_part.done", **at, part=part)
        return events + self._event("response.output_item.done", output_index=place, item=item)

    def _grow(self, kind: str, text: str) -> bytes:
        """Add text to the message or to the reasoning, which begins where there is none."""
        events = b"" if kind in self._open else self._add(self._empty(kind))
        place = self._open[kind]
        part = self._output[place]["content"][0]
        part["text"] += text
        logprobs = {"logprobs": self._take_logprobs(part)} if "logprobs" in part else {}
        return events + self._event(f"response.{part['type']}.delta", **self._at(place, 0), delta=text, **logprobs)

    def _empty(self, kind: str) -> dict[str, Any]:
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            return {"id": f"rs_{self.name}", "type": kind, "summary": [], "content": [part]}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        again = f"_{len(self._output)}" if any(item["type"] == kind for item in self._output) else ""
        return {"id": f"msg_{self.name}{again}", "type": kind, "role": "assistant", "content": [part]}

    def _call(self, call: Mapping[str, Any]) -> bytes:
        place, function = len(self._output), call["function"]
        item = {"id": f"fc_{self.name}_{place}", "type": "function_call", "call_id": call["id"], "arguments": ""}
        events = self._add(item | {"name": function["name"]})
        arguments = self._output[place]["arguments"] = function["arguments"]
        events += self._event("response.function_call_arguments.delta", **self._at(place), delta=arguments)
        whole = {"name": function["name"], "arguments": arguments}
        events += self._event("response.function_call_arguments.done", **self._at(place), **whole)
        return events + self._end("function_call")

    def _at(self, place: int, part: int | None = None) -> dict[str, Any]:
        where = {"item_id": self._output[place]["id"], "output_index": place}
        return where if part is None else where | {"content_index": part}

    def _take_logprobs(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        """Those of the tokens that came since; a token of a call or of a mark has its own, too."""
        new: list[dict[str, Any]] = []
        if "logprobs" in part:
            new, self._logprobs = self._logprobs, []
            part["logprobs"] += new
        return new


def _whole_delta(body: Mapping[str, Any]) -> dict[str, Any]:
    (choice,) = body["choices"]
    return {**choice, **choice["message"]}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
    }
