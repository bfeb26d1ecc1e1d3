"""Anthropic's message parameters in the words of OpenAI's chat completions, whose translation is `api.openai.requests`.

system, blocks, tool_use, tool_result, input_schema …  ──▶  messages, tool_calls, tools …  ──▶  a line of a job
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from api.openai.requests import translate
from jobs.errors import InvalidInput, UnsupportedContent

_SAME = frozenset(["max_tokens", "temperature", "top_p", "top_k"])
_IGNORED = frozenset(["metadata", "service_tier", "cache_control"])
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def line_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a job that a request's `params` ask for. Raises `InvalidInput` that names the field.

    `model` is left to the caller.
    """
    given = {name: value for name, value in params.items() if value is not None and name != "model"}
    if "max_tokens" not in given:
        raise InvalidInput("Field required", param="max_tokens")
    body: dict[str, Any] = {"messages": _messages(given.get("system"), given.get("messages"))}
    for name, value in given.items():
        if name in _SAME:
            body[name] = value
        elif name in _TAKEN:
            body |= _TAKEN[name](value)
        elif name not in _IGNORED and name not in ("system", "messages"):
            raise InvalidInput("no such field, or not supported here", param=name[:100])
    return translate(body, "/v1/chat/completions")


def _messages(system: object, messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise InvalidInput("a list of messages is expected, and at least one", param="messages")
    found: list[dict[str, Any]] = []
    if system is not None:
        found.append({"role": "system", "content": _text(system, "system")})
    for place, message in enumerate(messages):
        at = f"messages[{place}]"
        if not isinstance(message, dict) or not message.keys() <= {"role", "content"}:
            raise InvalidInput("an object with role and content is expected", param=at)
        if message.get("role") not in ("user", "assistant"):
            raise InvalidInput("one of user, assistant is expected", param=f"{at}.role")
        take = _user if message["role"] == "user" else _assistant
        found += take(_blocks(message.get("content"), f"{at}.content"), f"{at}.content")
    return found


def _blocks(content: object, at: str) -> list[dict[str, Any]]:
    """Content as blocks, each of which has a type."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise InvalidInput("a string or a list of blocks is expected", param=at)
    for place, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise InvalidInput("an object with a type is expected", param=f"{at}[{place}]")
    return content


def _text(content: object, at: str) -> str:
    """The text of blocks that may be nothing else."""
    texts = []
    for place, block in enumerate(_blocks(content, at)):
        if block["type"] != "text":
            raise UnsupportedContent("only blocks of type 'text' are understood", param=f"{at}[{place}].type")
        if not isinstance(block.get("text"), str):
            raise InvalidInput("a string is expected", param=f"{at}[{place}].text")
        texts.append(block["text"])
    return "".join(texts)


def _user(blocks: list[dict[str, Any]], at: str) -> list[dict[str, Any]]:
    """The answers of tools, each a message of its own, then what the user says."""
    messages = []
    said = [block for block in blocks if block["type"] != "tool_result"]
    for block in blocks:
        if block["type"] == "tool_result":
            content = block.get("content")
            text = "" if content is None else _text(content, f"{at}.content")
            messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
    if said:
        messages.append({"role": "user", "content": _text(said, at)})
    return messages


def _assistant(blocks: list[dict[str, Any]], at: str) -> list[dict[str, Any]]:
    calls = []
    said = []
    for place, block in enumerate(blocks):
        if block["type"] == "tool_use":
            given = block.get("input", {})
            if not isinstance(given, dict):
                raise InvalidInput("a JSON object is expected", param=f"{at}[{place}].input")
            function = {"name": block.get("name"), "arguments": orjson.dumps(given).decode()}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif block["type"] not in ("thinking", "redacted_thinking"):  # templates leave earlier reasoning out
            said.append(block)
    message: dict[str, Any] = {"role": "assistant", "content": _text(said, at) if said else None}
    return [message | ({"tool_calls": calls} if calls else {})]


def _tools(tools: object) -> dict[str, Any]:
    if not isinstance(tools, list):
        raise InvalidInput("a list is expected", param="tools")
    found = []
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type", "custom") != "custom":
            raise InvalidInput("only tools of the caller's own are called", param=f"tools[{place}]")
        unknown = tool.keys() - {"type", "name", "description", "input_schema", "cache_control", "strict"}
        if unknown:
            raise InvalidInput("no such field", param=f"tools[{place}].{min(unknown)[:100]}")
        names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
        function = {theirs: tool[ours] for ours, theirs in names.items() if tool.get(ours) is not None}
        found.append({"type": "function", "function": function})
    return {"tools": found}


def _tool_choice(choice: object) -> dict[str, Any]:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not choice.keys() <= {"type", "name", "disable_parallel_tool_use"}:
        raise InvalidInput("an object with a type is expected", param="tool_choice")
    if kind == "tool":
        chosen: object = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind in _CHOICES:
        chosen = _CHOICES[kind]
    else:
        raise InvalidInput("one of auto, any, tool, none is expected", param="tool_choice.type")
    single = choice.get("disable_parallel_tool_use")
    return {"tool_choice": chosen} | ({} if single is None else {"parallel_tool_calls": not single})


def _thinking(thinking: object) -> dict[str, Any]:
    if not isinstance(thinking, dict) or thinking.get("type") != "disabled":
        raise InvalidInput("only disabled is possible: the model's template decides", param="thinking.type")
    return {"chat_template_kwargs": {"enable_thinking": False}}


def _no_stream(stream: object) -> dict[str, Any]:
    if stream is not False:
        raise InvalidInput("a batch does not stream", param="stream")
    return {}


_TAKEN: Mapping[str, Callable[[object], dict[str, Any]]] = {
    "stop_sequences": lambda value: {"stop": value},
    "tools": _tools,
    "tool_choice": _tool_choice,
    "thinking": _thinking,
    "stream": _no_stream,
}
