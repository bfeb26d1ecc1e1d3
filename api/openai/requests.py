"""OpenAI's request bodies in the words of `jobs.requests`: a translation of names, before the one parser checks values.

    /v1/chat/completions   messages, max_completion_tokens, logprobs + top_logprobs …  ─┐
    /v1/completions        prompt, max_tokens (16), logprobs …                          ─┴─▶ a line of a job

Every optional field may be null. A field that is not known here is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from jobs.errors import InvalidInput, UnsupportedContent

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
Document = Mapping[str, Any]

LEGACY_MAX_TOKENS = 16  # where a legacy completion does not say
ROLES = ("system", "developer", "user", "assistant", "tool")

# Names and meanings that are ours too, and vLLM's extras.
_SAME = frozenset(
    [
        "temperature",
        "top_p",
        "frequency_penalty",
        "presence_penalty",
        "seed",
        "n",
        "logit_bias",
        "response_format",
        "min_p",
        "repetition_penalty",
        "min_tokens",
        "ignore_eos",
        "stop_token_ids",
        "skip_special_tokens",
        "include_stop_str_in_output",
        "structured_outputs",
        "add_special_tokens",
    ]
)
_IGNORED = frozenset(
    [
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "verbosity",
        "prediction",
        "service_tier",
    ]
)
_REFUSED = frozenset(["functions", "function_call", "audio", "web_search_options", "moderation"])
_OF_MESSAGES = ("name", "reasoning_content", "tool_call_id")
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
# What a request takes beside the body's own fields; `translate` reads these first.
_OUTER = frozenset({"model", "stream", "stream_options"})


def translate(body: Document, endpoint: Endpoint) -> dict[str, Any]:
    """The line of a job that a body asks for. Raises `InvalidInput` that names the field.

    `model` and `stream` are left to the caller.
    """
    given = {name: value for name, value in body.items() if value is not None and name not in _OUTER}
    own = _CHAT if endpoint == "/v1/chat/completions" else _LEGACY
    line: dict[str, Any] = {}
    for name, value in given.items():
        if name in own:
            continue
        if name in _SAME:
            line[name] = value
        elif name in _GUIDED:
            line["structured_outputs"] = {_GUIDED[name]: value}
        elif name == "stop":
            _stop(line, value)
        elif name == "top_k":
            line["top_k"] = 0 if value == -1 else value
        elif name == "modalities":
            if value != ["text"]:
                raise InvalidInput("only text is generated", param="modalities")
        elif name in _REFUSED:
            raise InvalidInput("not supported here", param=name)
        elif name not in _IGNORED:
            raise InvalidInput("no such field", param=name[:100])
    for name, take in own.items():
        take(line, given, name)
    return line


def _stop(line: dict[str, Any], value: object) -> None:
    # An empty string or list means none.
    if isinstance(value, list):
        value = [text for text in value if text != ""]
    if value not in ("", []):
        line["stop"] = value


def _messages(line: dict[str, Any], given: Document, name: str) -> None:
    messages = given.get(name)
    if not isinstance(messages, list) or not messages:
        raise InvalidInput("a list of messages is expected, and at least one", param=name)
    line[name] = [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]
    _check_answered(line[name])


def _check_answered(messages: list[dict[str, Any]]) -> None:
    """Each call has its answer right behind it, and each answer its call."""
    open_calls: set[object] = set()
    for place, message in enumerate(messages):
        if message["role"] == "tool":
            if message.get("tool_call_id") not in open_calls:
                raise InvalidInput(
                    "no call of the message before has this id, or it is answered",
                    param=f"messages[{place}].tool_call_id",
                )
            open_calls.remove(message["tool_call_id"])
            continue
        if open_calls:
            raise InvalidInput("the calls before this message are not all answered", param=f"messages[{place}]")
        open_calls = {call["id"] for call in message.get("tool_calls", ())}
    if open_calls:
        raise InvalidInput("its calls are not all answered", param=f"messages[{len(messages) - 1}].tool_calls")


def _message(message: object, at: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidInput("a JSON object is expected here", param=at)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidInput(f"one of {', '.join(ROLES)} is expected", param=f"{at}.role")
    line: dict[str, Any] = {"role": "system" if role == "developer" else role}
    line["content"] = _text(message.get("content"), f"{at}.content")
    line |= {name: message[name] for name in _OF_MESSAGES if message.get(name) is not None}
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise InvalidInput("a list is expected, of the assistant's calls", param=f"{at}.tool_calls")
        line["tool_calls"] = [_call(call, f"{at}.tool_calls[{place}]") for place, call in enumerate(calls)]
    return line


def _call(call: object, at: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(call.get("id"), str):
        raise InvalidInput("an object with an id and a function is expected here", param=at)
    # A message that a client put together from a stream holds more than its call.
    return {
        "id": call["id"],
        "type": call.get("type", "function"),
        "function": {name: function.get(name) for name in ("name", "arguments")},
    }


def _tools(line: dict[str, Any], given: Document, name: str) -> None:
    tools = given.get(name)
    if tools is None:
        return
    if not isinstance(tools, list) or not tools:
        raise InvalidInput("a list of tools is expected, and at least one", param=name)
    line[name] = [_without_nulls(tool) for tool in tools]


def _without_nulls(tool: object) -> object:
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        return tool
    return tool | {"function": {name: value for name, value in tool["function"].items() if value is not None}}


def _template_options(line: dict[str, Any], given: Document, name: str) -> None:
    options = given.get(name, {})
    effort = given.get("reasoning_effort")
    if effort is not None:
        if not isinstance(effort, str):
            raise InvalidInput("a string is expected", param="reasoning_effort")
        if isinstance(options, dict):
            options = {"reasoning_effort": effort, **options}
    if options:
        line[name] = options


def _text(content: object, at: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise InvalidInput("a string or a list of parts is expected", param=at)
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            raise UnsupportedContent("only parts of type 'text' are understood", param=f"{at}[{place}].type")
        text = part.get(kind)
        if not isinstance(text, str):
            raise InvalidInput("a string is expected", param=f"{at}[{place}].{kind}")
        texts.append(text)
    return "".join(texts)


def _chat_limit(line: dict[str, Any], given: Document, name: str) -> None:
    limits = {given[key] for key in ("max_tokens", "max_completion_tokens") if key in given}
    if len(limits) > 1:
        raise InvalidInput("differs from max_tokens", param=name)
    if limits:
        line["max_tokens"] = limits.pop()


def _chat_logprobs(line: dict[str, Any], given: Document, name: str) -> None:
    wanted, top = given.get("logprobs"), given.get("top_logprobs")
    if wanted not in (None, True, False):
        raise InvalidInput("true or false is expected", param="logprobs")
    if top is not None and not wanted:
        raise InvalidInput("needs logprobs: true", param="top_logprobs")
    if wanted:
        line["logprobs"] = 0 if top is None else top


def _prompt(line: dict[str, Any], given: Document, name: str) -> None:
    prompt = given.get(name)
    # A list of one prompt is that prompt; several are several lines, which the caller takes apart.
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if prompt is None or prompt == []:
        raise InvalidInput("a prompt is needed", param=name)
    if isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt):
        raise InvalidInput("one prompt is expected here, not several", param=name)
    line[name] = prompt


def _legacy_limit(line: dict[str, Any], given: Document, name: str) -> None:
    line[name] = given.get(name, LEGACY_MAX_TOKENS)


def _same(line: dict[str, Any], given: Document, name: str) -> None:
    if name in given:
        line[name] = given[name]


def _best_of(line: dict[str, Any], given: Document, name: str) -> None:
    if name in given and given[name] != given.get("n", 1):
        raise InvalidInput("only the value of n is possible", param=name)


def _suffix(line: dict[str, Any], given: Document, name: str) -> None:
    if given.get(name, "") != "":
        raise InvalidInput("not supported here", param=name)


def _nothing(line: dict[str, Any], given: Document, name: str) -> None:
    """Another field's function reads it."""


_Take = Callable[[dict[str, Any], Document, str], None]
_CHAT: Mapping[str, _Take] = {
    "messages": _messages,
    "tools": _tools,
    "tool_choice": _same,
    "parallel_tool_calls": _same,
    "chat_template_kwargs": _template_options,
    "reasoning_effort": _nothing,
    "add_generation_prompt": _same,
    "continue_final_message": _same,
    "max_completion_tokens": _chat_limit,
    "max_tokens": _nothing,
    "logprobs": _chat_logprobs,
    "top_logprobs": _nothing,
}
_LEGACY: Mapping[str, _Take] = {
    "prompt": _prompt,
    "max_tokens": _legacy_limit,
    "logprobs": _same,
    "echo": _same,
    "best_of": _best_of,
    "suffix": _suffix,
}

_OF_BOTH = _OUTER | _SAME | _IGNORED | _GUIDED.keys() | {"modalities", "stop", "top_k"}
ACCEPTED: Mapping[Endpoint, frozenset[str]] = {
    "/v1/chat/completions": _OF_BOTH | _CHAT.keys(),
    "/v1/completions": _OF_BOTH | _LEGACY.keys(),
}
"""Fields that a body may have."""
