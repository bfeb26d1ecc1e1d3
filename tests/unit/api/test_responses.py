"""`/v1/responses` as a translation: of requests into chat completions, and of their answers into items and events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import openai
import orjson
import pytest
from openai.types.responses import Response

from api.openai.lines import read_request
from api.openai.response_requests import ResponseRequest
from api.openai.responses import ResponseShape
from jobs.errors import InvalidInput
from jobs.requests import ModelLimits

MODEL = ModelLimits("demo", max_model_len=128, vocab_size=100)
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 5,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
LOGPROB = {"token": "Hi", "bytes": [72, 105], "logprob": -0.5, "top_logprobs": []}
USER = {"role": "user", "content": "a"}


def shape() -> ResponseShape:
    return ResponseShape("1", "demo", 1, "default", ResponseRequest.of({"input": "a"}).repeated)


def answered(message: dict[str, Any], reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    return {"choices": [choice], "usage": USAGE}


def streamed(*deltas: dict[str, Any]) -> bytes:
    """A stream whose last delta comes with the answer."""
    made = shape()
    events = made.opening()
    for delta in deltas[:-1]:
        events += made.events({"deltas": [{"index": 0, **delta}]})
    answer = {"response": {"body": answered({"content": "of no use, since deltas stand beside it"})}}
    return events + made.events({"deltas": [{"index": 0, **deltas[-1]}], "answer": answer}) + made.ending()


def read(events: bytes, use: Callable[[openai.OpenAI], Any]) -> Any:
    """What the official client makes of a stream."""
    answer = httpx2.Response(200, content=events, headers={"content-type": "text/event-stream"})
    http = httpx2.Client(transport=httpx2.MockTransport(lambda request: answer))
    with openai.OpenAI(api_key="x", base_url="http://pagemill", http_client=http) as client:
        return use(client)


def final(client: openai.OpenAI) -> Response:
    with client.responses.stream(model="demo", input="a") as stream:
        return stream.get_final_response()


def every_event(client: openai.OpenAI) -> list[Any]:
    return list(client.responses.create(model="demo", input="a", stream=True))


def test_client_puts_reasoning_text_and_calls_together() -> None:
    events = streamed(
        {"reasoning_content": "Let "},
        {"reasoning_content": "me."},
        {"content": "H", "logprobs": {"content": [LOGPROB], "refusal": None}},
        {"tool_calls": [CALL]},
        {"content": "i", "finish_reason": "tool_calls"},
    )
    made = read(events, final)
    assert [item.type for item in made.output] == ["reasoning", "message", "function_call", "message"]
    assert [item.status for item in made.output] == ["completed"] * 4
    assert len({item.id for item in made.output}) == 4
    assert made.output[0].content[0].text == "Let me."
    assert made.output_text == "Hi"
    assert made.output[1].content[0].logprobs[0].to_dict() == LOGPROB
    assert (made.output[2].call_id, made.output[2].name, made.output[2].arguments) == ("call_1", "f", '{"x": 1}')
    assert made.usage.to_dict() == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 14,
    }


def test_reasoning_ends_before_the_message_begins() -> None:
    events = read(streamed({"reasoning_content": "Let me."}, {"content": "Hi", "finish_reason": "stop"}), every_event)
    assert [(event.type.removeprefix("response."), event.sequence_number) for event in events] == [
        (kind, number)
        for number, kind in enumerate(
            [
                "created",
                "in_progress",
                "output_item.added",
                "content_part.added",
                "reasoning_text.delta",
                "reasoning_text.done",
                "content_part.done",
                "output_item.done",
                "output_item.added",
                "content_part.added",
                "output_text.delta",
                "output_text.done",
                "content_part.done",
                "output_item.done",
                "completed",
            ]
        )
    ]


def test_item_of_a_stream_ends_before_the_next_begins() -> None:
    events = read(
        streamed(
            {"reasoning_content": "Let me."},
            {"content": "H"},
            {"tool_calls": [CALL, CALL]},
            {"content": "i", "finish_reason": "tool_calls"},
        ),
        every_event,
    )
    kinds = ("response.output_item.added", "response.output_item.done")
    told = [(event.type, event.output_index) for event in events if event.type in kinds]
    assert told == [(kind, place) for place in range(5) for kind in kinds]
    # An item that has ended is as the whole response has it.
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == events[-1].response.output


def test_whole_answer_is_that_of_its_stream() -> None:
    message = {"content": "Hi", "reasoning_content": "Let me.", "tool_calls": [CALL]}
    whole = shape().whole({1: answered(message, "tool_calls")})
    last = read(streamed({**message, "finish_reason": "tool_calls"}), every_event)[-1]
    assert [item.to_dict() for item in last.response.output] == whole["output"]
    assert last.response.status == whole["status"] == "completed"


def test_empty_answer_is_an_empty_message() -> None:
    made = read(streamed({"finish_reason": "stop"}), final)
    assert (len(made.output), made.output_text, made.status) == (1, "", "completed")


def test_cut_answer_is_incomplete_and_so_is_its_message() -> None:
    events = read(streamed({"content": "H", "finish_reason": "length"}), every_event)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"
    assert events[-1].response.output[0].status == "incomplete"


@pytest.mark.parametrize(
    ("kind", "code"), [("invalid_request_error", "invalid_prompt"), ("server_error", "server_error")]
)
def test_error_in_the_middle_fails_the_response(kind: str, code: str) -> None:
    made = shape()
    events = made.opening() + made.events({"deltas": [{"index": 0, "content": "H"}]})
    events += made.failure({"error": {"message": "gone", "type": kind, "param": None, "code": "unavailable"}})
    last = read(events, every_event)[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert (last.response.error.code, last.response.error.message) == (code, "gone")


def test_items_become_the_messages_of_a_chat() -> None:
    asked = ResponseRequest.of(
        {
            "instructions": "Be exact.",
            "input": [
                USER,
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "status": "completed"},
                {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "x"},
                {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
                {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "3", "output": "z"},
            ],
        }
    )
    roles = [
        (message["role"], [call["id"] for call in message.get("tool_calls", ())]) for message in asked.chat["messages"]
    ]
    assert roles == [
        ("system", []),
        ("user", []),
        ("assistant", ["1", "2"]),
        ("tool", []),
        ("tool", []),
        ("assistant", ["3"]),
        ("tool", []),
    ]


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": ["a"]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [USER, {"role": "user", "content": [{"type": "input_image"}]}]}, "input[1].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": [{"type": ["x"]}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": {}}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [USER, {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}]}, "input[1]"),
        (
            {
                "input": [
                    {"type": "function_call", "call_id": "1", "name": "!", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "1", "output": "x"},
                ]
            },
            "input[0].name",
        ),
        (
            {
                "input": [
                    {"role": "assistant", "content": "b"},
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                    {"type": "function_call", "call_id": "2", "name": "!", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "1", "output": "x"},
                    {"type": "function_call_output", "call_id": "2", "output": "x"},
                ]
            },
            "input[2].name",
        ),
        ({"input": [USER, {"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input[1].call_id"),
        ({"input": [USER, {"type": "function_call_output", "call_id": "1"}]}, "input[1].output"),
        ({"instructions": 1}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "9"}, "max_output_tokens"),
        ({"temperature": 11}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"include": [["x"]]}, "include[0]"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": "x"}, "text"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "name": "!"}]}, "tools[0].name"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"effort": 1}}, "reasoning.effort"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"store": "yes"}, "store"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"messages": [USER]}, "messages"),
        ({"n": 2}, "n"),
    ],
)
def test_wrong_field_has_its_name_in_the_request(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_request({"model": "demo", **({} if asked == {} else {"input": "a"}), **asked}, "/v1/responses", 1, MODEL)
    assert caught.value.param == param


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
    "required": ["x"],
}
STRICT_POINT = {**POINT, "required": ["x", "unit"], "additionalProperties": False}


def tools_of(**function: Any) -> tuple[Any, Any]:
    """Of a request with one tool: the tool as it is stored for the worker, and as the response shows it."""
    tool = {"type": "function", "name": "f", **function}
    asked = read_request({"input": "a", "tools": [tool]}, "/v1/responses", 1, MODEL)
    (stored,), (shown,) = orjson.loads(asked.line.body)["tools"], asked.repeated["tools"]
    return stored, shown


@pytest.mark.parametrize("left_out", [{}, {"strict": None}])
def test_function_without_strict_is_strict(left_out: dict[str, None]) -> None:
    stored, shown = tools_of(parameters=POINT, **left_out)
    assert stored == {"type": "function", "function": {"name": "f", "parameters": STRICT_POINT}, "strict": True}
    assert shown == {"type": "function", "name": "f", "parameters": STRICT_POINT, "strict": True}


@pytest.mark.parametrize("strict", [True, False])
def test_function_that_says_whether_it_is_strict_keeps_its_schema(strict: bool) -> None:
    stored, shown = tools_of(parameters=POINT, strict=strict)
    assert stored["function"]["parameters"] == shown["parameters"] == POINT
    assert stored.get("strict", False) is shown["strict"] is strict


def test_function_whose_schema_has_no_strict_form_is_not_strict() -> None:
    open_object = {"type": "object", "additionalProperties": {"type": "string"}}
    stored, shown = tools_of(parameters=open_object)
    assert stored == {"type": "function", "function": {"name": "f", "parameters": open_object}}
    assert shown == {"type": "function", "name": "f", "parameters": open_object, "strict": False}


def test_function_without_parameters_takes_none() -> None:
    stored, _ = tools_of()
    assert stored["strict"] is True
    assert (stored["function"]["parameters"]["properties"], stored["function"]["parameters"]["required"]) == ({}, [])


def test_what_means_nothing_here_is_accepted() -> None:
    asked = {
        "input": "a",
        "background": False,
        "conversation": None,
        "include": ["reasoning.encrypted_content"],
        "max_tool_calls": 3,
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "reasoning": {"effort": None, "summary": "auto"},
        "service_tier": "auto",
        "store": True,
        "stream": True,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
        "user": "u",
    }
    read = read_request(asked, "/v1/responses", 1, MODEL)
    assert b'"messages":[{"role":"user","content":"a"}]' in read.line.body
    assert read.repeated["tool_choice"] == "auto"
