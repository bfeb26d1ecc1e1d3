"""`client.responses` of the official client; a class of `test_openai_clients.py`, whose stack it shares."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import FunctionTool, Response, ResponseFunctionToolCall, ResponseOutputMessage
from pydantic import BaseModel

from cli.models import DEMO
from tests.acceptance.openai_batches import ADD, ended

GREEDY: Any = {"model": DEMO, "temperature": 0, "max_output_tokens": 90}
TOOL: Any = {"type": "function", **ADD["function"]}
CALL: Any = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "add"}}
SUM = "17 + 58 ="


def said(item: BaseModel) -> dict[str, Any]:
    """An item without its ids, which are those of its answer."""
    return item.model_dump(exclude={"id", "call_id"}, exclude_unset=True)


class Size(BaseModel):
    size: Literal["small", "large"]


class TestResponses:
    def test_response_says_what_a_chat_says(self, client: openai.OpenAI) -> None:
        messages: Any = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": SUM}]
        chat = client.chat.completions.create(model=DEMO, messages=messages, temperature=0, max_tokens=90)
        made = client.responses.create(input=SUM, instructions="Be exact.", metadata={"k": "v"}, **GREEDY)
        assert (made.output_text, made.status) == (chat.choices[0].message.content, "completed")
        assert (made.instructions, made.metadata, made.tools) == ("Be exact.", {"k": "v"}, [])
        assert made.usage is not None
        assert chat.usage is not None
        assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.total_tokens) == (
            chat.usage.prompt_tokens,
            chat.usage.completion_tokens,
            chat.usage.total_tokens,
        )
        assert made.usage.input_tokens_details.cached_tokens >= 0
        parts: Any = [{"role": "developer", "content": "Be exact."}, {"role": "user", "content": []}]
        parts[1]["content"] = [{"type": "input_text", "text": "17 + "}, {"type": "input_text", "text": "58 ="}]
        again = client.responses.create(input=parts, **GREEDY)
        assert again.output_text == made.output_text
        assert again.usage is not None
        assert again.usage.input_tokens == made.usage.input_tokens

    def test_stream_is_that_of_the_whole(self, client: openai.OpenAI) -> None:
        whole = client.responses.create(input=SUM, include=["message.output_text.logprobs"], **GREEDY)
        events = list(
            client.responses.create(input=SUM, include=["message.output_text.logprobs"], stream=True, **GREEDY)
        )
        kinds = [event.type for event in events if event.type != "response.output_text.delta"]
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        final = events[-1]
        assert final.type == "response.completed"
        (told,), (expected,) = final.response.output, whole.output
        assert isinstance(told, ResponseOutputMessage)
        assert isinstance(expected, ResponseOutputMessage)
        assert told.content == expected.content
        assert final.response.usage == whole.usage
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == (
            whole.output_text
        )
        with client.responses.stream(input=SUM, **GREEDY) as stream:
            assert stream.get_final_response().output_text == whole.output_text

    def test_schema_holds_by_parse(self, client: openai.OpenAI) -> None:
        parsed = client.responses.parse(input="1 + 1 =", text_format=Size, **GREEDY)
        assert isinstance(parsed.output_parsed, Size)
        with client.responses.stream(input="1 + 1 =", text_format=Size, **GREEDY) as stream:
            assert stream.get_final_response().output_parsed == parsed.output_parsed

    def test_call_is_forced_streamed_and_answered(self, client: openai.OpenAI) -> None:
        asked: Any = [{"role": "user", "content": "1 + 1 ="}]
        whole = client.responses.create(input=asked, **CALL, **GREEDY)
        (call,) = whole.output
        assert isinstance(call, ResponseFunctionToolCall)
        assert (call.name, call.status) == ("add", "completed")
        assert 0 <= json.loads(call.arguments)["a"] <= 9
        with client.responses.stream(input=asked, **CALL, **GREEDY) as stream:
            kinds = [event.type for event in stream]
            (streamed,) = stream.get_final_response().output
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert isinstance(streamed, ResponseFunctionToolCall)
        assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
        answer: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
        made = client.responses.create(input=[*asked, *whole.output, answer], tools=[TOOL], **GREEDY)
        assert made.status == "completed"
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(input=[*asked, *whole.output], tools=[TOOL], **GREEDY)
        assert caught.value.param == "input[1]"

    def test_call_of_a_function_without_strict_has_all_arguments(self, client: openai.OpenAI) -> None:
        parameters = {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": [2]}}, "required": ["a"]}
        tool: Any = {"type": "function", "name": "f", "parameters": parameters}
        choice: Any = {"type": "function", "name": "f"}
        made = client.responses.create(input="1 + 1 =", tools=[tool], tool_choice=choice, **GREEDY)
        (call,), (shown,) = made.output, made.tools
        assert isinstance(call, ResponseFunctionToolCall)
        assert isinstance(shown, FunctionTool)
        assert json.loads(call.arguments) == {"a": 1, "b": 2}
        assert (shown.strict, shown.parameters) == (
            True,
            {**parameters, "required": ["a", "b"], "additionalProperties": False},
        )

    def test_batch_of_responses_answers_with_responses(self, client: openai.OpenAI) -> None:
        bodies: dict[str, Any] = {
            "text": {"input": SUM, "instructions": "Be exact.", **GREEDY},
            "call": {"input": "1 + 1 =", **CALL, **GREEDY},
            "wrong": {"input": SUM, "previous_response_id": "resp_1", **GREEDY},
        }
        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/responses", "body": body} for name, body in bodies.items()
        ]
        done = ended(client, lines, "/v1/responses")
        content = client.files.content(done.output_file_id or "").text
        found = {line["custom_id"]: line["response"]["body"] for line in map(json.loads, content.splitlines())}
        assert found.keys() == {"text", "call"}
        for name, body in found.items():
            # The client's own reading of the answer, as of a live one.
            stored, live = Response.model_validate(body), client.responses.create(**bodies[name])
            assert [said(item) for item in stored.output] == [said(item) for item in live.output]
            assert stored.to_dict(exclude_unset=True).keys() == live.to_dict(exclude_unset=True).keys()
            assert (stored.instructions, stored.tools, stored.status) == (live.instructions, live.tools, "completed")
        (line,) = client.files.content(done.error_file_id or "").text.splitlines()
        assert json.loads(line)["response"]["body"]["error"]["param"] == "previous_response_id"

    def test_answer_that_is_cut_is_incomplete(self, client: openai.OpenAI) -> None:
        asked: Any = {**GREEDY, "max_output_tokens": 1, "extra_body": {"ignore_eos": True}}
        made = client.responses.create(input=SUM, **asked)
        assert made.status == "incomplete"
        assert made.incomplete_details is not None
        assert made.incomplete_details.reason == "max_output_tokens"
        last = list(client.responses.create(input=SUM, stream=True, **asked))[-1]
        assert last.type == "response.incomplete"
        assert [item.status for item in [*last.response.output, *made.output]] == ["incomplete"] * 2

    @pytest.mark.parametrize(
        ("asked", "error", "param"),
        [
            ({"model": "nothing"}, openai.NotFoundError, "model"),
            ({"previous_response_id": "resp_1"}, openai.BadRequestError, "previous_response_id"),
            ({"conversation": "conv_1"}, openai.BadRequestError, "conversation"),
            ({"prompt": {"id": "p"}}, openai.BadRequestError, "prompt"),
            ({"background": True}, openai.BadRequestError, "background"),
            ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools[0].type"),
            ({"extra_body": {"n": 2}}, openai.BadRequestError, "n"),
            ({"max_output_tokens": 10**7}, openai.BadRequestError, "max_output_tokens"),
        ],
    )
    @pytest.mark.parametrize("streams", [False, True])
    def test_what_is_not_possible_is_refused_by_name(
        self,
        client: openai.OpenAI,
        asked: dict[str, Any],
        error: type[openai.APIStatusError],
        param: str,
        streams: bool,
    ) -> None:
        with pytest.raises(error) as caught:
            client.responses.create(**{"input": SUM, "stream": streams, **GREEDY, **asked})
        assert caught.value.param == param

    def test_input_that_proves_too_long_keeps_its_status_in_a_stream(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(input="1 + " * 2000, stream=True, **GREEDY)
        assert caught.value.code == "context_length_exceeded"
