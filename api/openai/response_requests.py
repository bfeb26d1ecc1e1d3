"""Requests of `/v1/responses` in the words of chat completions, whose translation is `api.openai.requests`.

    instructions, input, max_output_tokens, text.format, flat tools …  ──▶  messages, response_format, tools …

Nothing is kept between two requests: what needs an earlier one, or a tool of the service's own, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from api.openai.strict_schemas import in_strict_mode
from jobs.errors import InvalidInput, UnsupportedContent

Document = Mapping[str, Any]

# The first are Responses' own; the others are extras of chat completions, where they mean the same.
_SAME = frozenset(
    [
        "temperature",
        "top_p",
        "parallel_tool_calls",
        "chat_template_kwargs",
        "frequency_penalty",
        "ignore_eos",
        "logit_bias",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "top_k",
    ]
)
_IGNORED = frozenset(
    [
        "max_tool_calls",  # of tools of the service's own
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    ]
)
_STORED = frozenset(["previous_response_id", "conversation", "prompt"])
_OUTER = frozenset(["model", "stream", "stream_options"])
_INCLUDED = {"message.output_text.logprobs", "reasoning.encrypted_content"}
_ROLES = ("user", "assistant", "system", "developer")
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_TOOL = {"name", "description", "parameters", "strict"}
_MESSAGE = re.compile(r"messages\[(\d+)\](\.tool_calls(?:\[(\d+)\])?)?(.*)", re.DOTALL)
# Fields whose names differ, from a chat completion's to a response's.
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "reasoning_effort": "reasoning.effort",
}
_ITEM_NAMES = {
    ".function.name": ".name",
    ".function.arguments": ".arguments",
    ".id": ".call_id",
    ".tool_call_id": ".call_id",
}


@dataclass(slots=True)
class _Place:
    """Where a message stands in the request, and each of its calls."""

    at: str
    is_output: bool = False
    calls: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ResponseRequest:
    """A request: the chat completion that it asks for, and what its response repeats of it."""

    chat: dict[str, Any] = field(default_factory=dict)
    repeated: dict[str, Any] = field(default_factory=dict)
    _places: list[_Place] = field(default_factory=list)
    """Of the chat's messages."""

    @classmethod
    def of(cls, body: Document) -> ResponseRequest:
        """Raises `InvalidInput` that names the field. `model` and `stream` are left to the caller."""
        given = {name: value for name, value in body.items() if value is not None and name not in _OUTER}
        if isinstance(given.get("tools"), list):
            given["tools"] = [_strict_by_default(tool) for tool in given["tools"]]
        request = cls()
        request.chat["messages"] = request._messages(given)
        for name, value in given.items():
            if name in _SAME:
                request.chat[name] = value
            elif name in _TAKEN:
                request.chat |= _TAKEN[name](value)
            elif name in _STORED:
                raise InvalidInput("not supported here: nothing is stored, so send all in input", param=name)
            elif name not in ACCEPTED:
                raise InvalidInput("no such field, or not supported here", param=name[:100])
        if "tools" not in request.chat and request.chat.get("tool_choice") in ("auto", "none"):
            del request.chat["tool_choice"]
        request.repeated = _repeated(given)
        return request

    def param(self, of_chat: str | None) -> str | None:
        """A field of the chat completion, by its name in the request."""
        if of_chat is None:
            return None
        found = _MESSAGE.fullmatch(of_chat)
        if found is None:
            if of_chat.startswith("response_format"):
                return "text.format" + of_chat.removeprefix("response_format").replace(".json_schema", "", 1)
            if of_chat.startswith("tool"):
                return of_chat.replace(".allowed_tools", "", 1).replace(".function", "", 1)
            return _NAMES.get(of_chat, of_chat)
        place, rest = self._places[int(found[1])], found[4]
        if found[2] is not None:
            return place.calls[int(found[3] or -1)] + _ITEM_NAMES.get(rest, rest)
        if place.is_output and rest.startswith(".content"):
            rest = ".output" + rest.removeprefix(".content")
        return place.at + _ITEM_NAMES.get(rest, rest)

    def _messages(self, given: Document) -> list[dict[str, Any]]:
        instructions, items = given.get("instructions"), given.get("input")
        messages: list[dict[str, Any]] = []
        if instructions is not None:
            if not isinstance(instructions, str):
                raise InvalidInput("a string is expected", param="instructions")
            self._add(messages, {"role": "system", "content": instructions}, _Place("instructions"))
        if isinstance(items, str):
            self._add(messages, {"role": "user", "content": items}, _Place("input"))
            return messages
        if not isinstance(items, list) or not items:
            raise InvalidInput("a string or a list of items is expected, and at least one", param="input")
        for number, item in enumerate(items):
            at = f"input[{number}]"
            if not isinstance(item, dict):
                raise InvalidInput("a JSON object is expected here", param=at)
            kind = item.get("type")
            if kind in (None, "message"):
                self._message(messages, item, at)
            elif kind == "function_call":
                self._call(messages, item, at)
            elif kind == "function_call_output":
                content = _content(item.get("output"), f"{at}.output")
                answer = {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
                self._add(messages, answer, _Place(at, is_output=True))
            elif kind == "item_reference":
                raise InvalidInput("nothing is stored here: send the item itself", param=f"{at}.type")
            elif kind != "reasoning":  # templates leave earlier reasoning out
                raise UnsupportedContent(
                    "one of message, function_call, function_call_output, reasoning is expected", param=f"{at}.type"
                )
        if not messages:
            raise InvalidInput("a message is needed beside the reasoning", param="input")
        return messages

    def _add(self, messages: list[dict[str, Any]], message: dict[str, Any], place: _Place) -> None:
        messages.append(message)
        self._places.append(place)

    def _message(self, messages: list[dict[str, Any]], item: Document, at: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise InvalidInput(f"one of {', '.join(_ROLES)} is expected", param=f"{at}.role")
        self._add(messages, {"role": role, "content": _content(item.get("content"), f"{at}.content")}, _Place(at))

    def _call(self, messages: list[dict[str, Any]], item: Document, at: str) -> None:
        """Calls that follow each other, or what the assistant said, are of one turn."""
        if not messages or messages[-1]["role"] != "assistant":
            self._add(messages, {"role": "assistant", "content": None}, _Place(at))
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        if not isinstance(item.get("call_id"), str):
            raise InvalidInput("a string is expected", param=f"{at}.call_id")
        call = {"id": item["call_id"], "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
        self._places[-1].calls.append(at)


def _content(content: object, at: str) -> object:
    """Texts as they are, and parts as those of a chat's message."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidInput("a string or a list of parts is expected", param=at)
    parts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _PARTS:
            raise UnsupportedContent(
                "only parts of type 'input_text' and 'output_text' are understood", param=f"{at}[{place}].type"
            )
        name = _PARTS[kind]
        parts.append({"type": name, name: part.get(name)})
    return parts


def _text(text: object) -> dict[str, Any]:
    if not isinstance(text, dict) or not text.keys() <= {"format", "verbosity"}:
        raise InvalidInput("an object with a format is expected", param="text")
    wanted = text.get("format")
    if wanted is None:
        return {}
    if not isinstance(wanted, dict):
        raise InvalidInput("a JSON object is expected here", param="text.format")
    if wanted.get("type") != "json_schema":
        return {"response_format": wanted}
    schema = {name: value for name, value in wanted.items() if name != "type" and value is not None}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _tools(tools: object) -> dict[str, Any]:
    if not isinstance(tools, list):
        raise InvalidInput("a list of tools is expected", param="tools")
    found = []
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise InvalidInput("only tools of type 'function' are possible", param=f"tools[{place}].type")
        function = {name: value for name, value in tool.items() if name != "type" and value is not None}
        unknown = function.keys() - _TOOL
        if unknown:
            raise InvalidInput("no such field, or not supported here", param=f"tools[{place}].{min(unknown)[:100]}")
        found.append({"type": "function", "function": function})
    return {"tools": found} if found else {}


def _strict_by_default(tool: object) -> object:
    """A function that leaves `strict` out is strict where its schema can be; what is no function stays as it is."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or tool.get("strict") is not None:
        return tool
    parameters = in_strict_mode(tool.get("parameters"))
    return {**tool, "strict": False} if parameters is None else {**tool, "strict": True, "parameters": parameters}


def _tool_choice(choice: object) -> dict[str, Any]:
    if isinstance(choice, dict):
        kind = choice.get("type")
        if kind == "function":
            choice = {"type": kind, "function": {"name": choice.get("name")}}
        elif kind == "allowed_tools":
            allowed = choice.get("tools")
            tools = [_named(tool) for tool in allowed] if isinstance(allowed, list) else allowed
            choice = {"type": kind, "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
        else:
            raise InvalidInput("one of function, allowed_tools is expected", param="tool_choice.type")
    return {"tool_choice": choice}


def _named(tool: object) -> object:
    return {"type": tool.get("type"), "function": {"name": tool.get("name")}} if isinstance(tool, dict) else tool


def _reasoning(reasoning: object) -> dict[str, Any]:
    if not isinstance(reasoning, dict) or not reasoning.keys() <= {"effort", "summary", "generate_summary"}:
        raise InvalidInput("an object with an effort is expected", param="reasoning")
    effort = reasoning.get("effort")
    return {} if effort is None else {"reasoning_effort": effort}


def _include(include: object) -> dict[str, Any]:
    if not isinstance(include, list):
        raise InvalidInput("a list is expected", param="include")
    for place, name in enumerate(include):
        if not isinstance(name, str) or name not in _INCLUDED:
            raise InvalidInput("not supported here", param=f"include[{place}]")
    return {"logprobs": True} if "message.output_text.logprobs" in include else {}


def _truncation(truncation: object) -> dict[str, Any]:
    if truncation != "disabled":
        raise InvalidInput("only disabled is possible: what is too long is refused", param="truncation")
    return {}


def _background(background: object) -> dict[str, Any]:
    if background is not False:
        raise InvalidInput("not supported here: a response is not stored", param="background")
    return {}


_TAKEN: Mapping[str, Callable[[object], dict[str, Any]]] = {
    "background": _background,
    "include": _include,
    "max_output_tokens": lambda value: {"max_completion_tokens": value},
    "reasoning": _reasoning,
    "text": _text,
    "tool_choice": _tool_choice,
    "tools": _tools,
    "top_logprobs": lambda value: {"logprobs": True, "top_logprobs": value},
    "truncation": _truncation,
}

_OTHER = frozenset(["input", "instructions", "metadata"])
ACCEPTED = _OUTER | _SAME | _IGNORED | _OTHER | _TAKEN.keys()
"""Fields that a body may have."""


def _repeated(given: Document) -> dict[str, Any]:
    """Fields of a response that repeat its request; those that are checked elsewhere are right by then."""
    metadata = given.get("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidInput("an object of strings is expected", param="metadata")
    store = given.get("store")
    if store not in (None, True, False):
        raise InvalidInput("true or false is expected", param="store")
    text, reasoning = given.get("text", {}), given.get("reasoning", {})
    return {
        "instructions": given.get("instructions"),
        "max_output_tokens": given.get("max_output_tokens"),
        "metadata": metadata,
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "temperature": given.get("temperature"),
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": given.get("tools", []),
        "top_logprobs": given.get("top_logprobs", 0),
        "top_p": given.get("top_p"),
    }
