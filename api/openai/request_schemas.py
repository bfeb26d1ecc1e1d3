"""What `/openapi.json` says of the bodies of live requests: the names that the translations take, and their types."""

from __future__ import annotations

from typing import Any

from api.openai.lines import Endpoint
from api.openai.requests import ACCEPTED as OF_COMPLETIONS
from api.openai.requests import ROLES
from api.openai.response_requests import ACCEPTED as OF_RESPONSES
from jobs.requests import PromptLine

_LINE = PromptLine.model_json_schema(ref_template="#/components/schemas/{model}")["properties"]
_FLAG: dict[str, Any] = {"type": ["boolean", "null"]}
_TEXT: dict[str, Any] = {"type": ["string", "null"]}
_OBJECT: dict[str, Any] = {"type": ["object", "null"]}
_COUNT: dict[str, Any] = {"type": ["integer", "null"]}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
_PARTS: dict[str, Any] = {
    "type": "array",
    "items": {"type": "object", "properties": {"type": {"type": "string"}, "text": {"type": "string"}}},
}
_CONTENT: dict[str, Any] = {"anyOf": [{"type": "string"}, _PARTS]}
_BOTH: dict[str, Any] = {"model": {"type": "string"}, "stream": _FLAG, "stream_options": _OBJECT, "service_tier": _TEXT}
_CHAT: dict[str, Any] = {
    "messages": {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "required": ["role"],
            "properties": {"role": {"enum": list(ROLES)}, "content": _CONTENT},
        },
    },
    "background": _FLAG,
    "logprobs": _FLAG,
    "max_completion_tokens": _LINE["max_tokens"],
    "top_logprobs": _COUNT,
}
_LEGACY: dict[str, Any] = {
    "prompt": {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}},
            _IDS,
            {"type": "array", "items": _IDS},
        ]
    },
    "background": _FLAG,
    "best_of": _COUNT,
    "suffix": _TEXT,
}
_RESPONSE: dict[str, Any] = {
    "input": {
        "anyOf": [
            {"type": "string"},
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"type": {"type": "string"}, "role": {"type": "string"}, "content": _CONTENT},
                },
            },
        ]
    },
    "include": {"type": ["array", "null"], "items": {"type": "string"}},
    "instructions": _TEXT,
    "max_output_tokens": _LINE["max_tokens"],
    "metadata": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
    "reasoning": _OBJECT,
    "store": _FLAG,
    "text": _OBJECT,
    "tool_choice": {},  # tools are flat here, and so is what names one
    "tools": {"type": ["array", "null"], "items": {"type": "object"}},
    "top_logprobs": _COUNT,
}


def live_request(endpoint: Endpoint) -> dict[str, Any]:
    """`openapi_extra` of the route: its body, which it reads itself, and its two kinds of answers."""
    if endpoint == "/v1/responses":
        accepted, own, needed = OF_RESPONSES, _RESPONSE, ["model", "input"]
    elif endpoint == "/v1/completions":
        accepted, own, needed = OF_COMPLETIONS[endpoint] | {"background"}, _LEGACY, ["model", "prompt"]
    else:
        accepted, own, needed = OF_COMPLETIONS[endpoint] | {"background"}, _CHAT, ["model", "messages"]
    types = {**_LINE, **_BOTH, **own}
    schema = {
        "type": "object",
        "required": needed,
        "properties": {name: types.get(name, {}) for name in sorted(accepted)},
        "additionalProperties": False,
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {
                "description": "OpenAI's object, or with `stream` its server-sent events.",
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            }
        },
    }
