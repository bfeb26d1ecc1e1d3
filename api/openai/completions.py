"""Answers of `/v1/chat/completions` and `/v1/completions`, whole and as the events that OpenAI's clients read.

data: {chunk with the role}      one a choice, chat only
data: {chunk with text} …
data: {chunk with finish_reason}
data: {chunk with usage, no choices}      where `stream_options.include_usage` asks for it
data: [DONE]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from api.openai.live_hub import Message

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class CompletionShape:
    """What all chunks of an answer have in common. `n` choices a line."""

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

    def ending(self) -> bytes:
        """What follows the last message."""
        return (self.chunk([], self.usage) if self.wants_usage else b"") + DONE

    def failure(self, error: Mapping[str, Any]) -> bytes:
        """An error in the middle of a stream, which it ends."""
        return b"data: " + orjson.dumps(error) + b"\n\n" + DONE

    def whole(self, bodies: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """All choices of all lines in one answer; `bodies` are the answers of lines."""
        choices: list[dict[str, Any]] = []
        usage: dict[str, Any] = {}
        for line in sorted(bodies):
            first = len(choices)
            choices += [{**choice, "index": first + place} for place, choice in enumerate(bodies[line]["choices"])]
            add_usage(usage, bodies[line]["usage"])
        return {
            "id": self.id,
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "service_tier": self.service_tier,
            "choices": choices,
            "usage": usage,
        }

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
