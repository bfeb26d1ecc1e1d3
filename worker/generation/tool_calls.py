"""Tool calls in the words of three families of chat templates.

hermes    <tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>, one behind the other    Qwen, Hermes
llama     {"name": …, "parameters": {…}}; {…}                                               Llama 3
mistral   [TOOL_CALLS][{"name": …, "arguments": {…}}, …]                                    Mistral, Mixtral
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import InvalidPrompt

CallFormat = Literal["hermes", "llama", "mistral"]

HERMES_BEGIN, HERMES_END = "<tool_call>", "</tool_call>"
MISTRAL_BEGIN = "[TOOL_CALLS]"
_MISTRAL_ID = 9  # letters and digits, by its templates


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that an answer may call, or has to."""

    format: CallFormat
    functions: Mapping[str, Mapping[str, Any]]
    """Those that may be called, by name: `parameters`, and `strict` where the arguments have to keep to them."""
    is_forced: bool
    is_single: bool
    """At most one call."""


def call_format(template: str) -> CallFormat:
    """How a model that was trained with this chat template writes its calls."""
    if MISTRAL_BEGIN in template:
        return "mistral"
    return "llama" if HERMES_BEGIN not in template and '"parameters"' in template else "hermes"


def tools_of(body: Mapping[str, Any], template: str) -> Tools | None:
    """The tools of a stored line that its answer may call; None where there are none, or its choice is "none"."""
    functions = {
        tool["function"]["name"]: tool["function"] | {"strict": tool.get("strict", False)}
        for tool in body.get("tools", ())
    }
    choice = body.get("tool_choice", "auto")
    if not functions or choice == "none":
        return None
    is_forced, is_single = choice == "required", body.get("parallel_tool_calls") is False
    if isinstance(choice, dict) and choice["type"] == "function":
        # A named function is called once, as OpenAI has it.
        is_forced = is_single = True
        functions = {choice["function"]["name"]: functions[choice["function"]["name"]]}
    elif isinstance(choice, dict):
        allowed = choice["allowed_tools"]
        is_forced = allowed["mode"] == "required"
        functions = {tool["function"]["name"]: functions[tool["function"]["name"]] for tool in allowed["tools"]}
    return Tools(call_format(template), functions, is_forced, is_single)


def read_calls(text: str, tools: Tools) -> list[tuple[str, str]] | None:
    """Names and arguments of the calls that `text` is made of; None where it is anything else.

    In hermes' form `text` stands between the tags. A function that may not be called makes it plain text.
    """
    decoder = json.JSONDecoder(strict=False, parse_constant=_refuse)
    found: list[Any] = []
    rest = text.strip()
    try:
        while rest:
            document, end = decoder.raw_decode(rest)
            found += document if isinstance(document, list) else [document]
            rest = rest[end:].lstrip().removeprefix(";").lstrip()
    except (ValueError, RecursionError):
        return None
    calls = []
    for call in found:
        if not isinstance(call, dict) or call.get("name") not in tools.functions:
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        calls.append((call["name"], json.dumps(arguments, ensure_ascii=False)))
    return calls or None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def call_id(choice_name: str, number: int) -> str:
    """The id of a call; `choice_name` is unique in the service. Equal each time it is asked for."""
    return f"call_{hashlib.blake2b(f'{choice_name} {number}'.encode(), digest_size=12).hexdigest()}"


def conversation(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Stored messages as the template takes them: arguments as objects, and ids of the length that Mistral's want."""
    is_mistral = call_format(template) == "mistral"

    def identity(given: str) -> str:
        return hashlib.blake2b(given.encode()).hexdigest()[:_MISTRAL_ID] if is_mistral else given

    result = []
    for stored in messages:
        message = dict(stored)
        if "tool_calls" in message:
            message["tool_calls"] = [
                {
                    "id": identity(call["id"]),
                    "type": "function",
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": _object(call["function"]["arguments"]),
                    },
                }
                for call in message["tool_calls"]
            ]
        if "tool_call_id" in message:
            message["tool_call_id"] = identity(message["tool_call_id"])
        result.append(message)
    return result


def _object(arguments: str) -> dict[str, Any]:
    try:
        parsed = json.loads(arguments or "{}", strict=False)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidPrompt("the arguments of a tool call are no JSON object")
    return parsed
