"""From stored lines to tokens and parameters, without a thread and without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import orjson
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine import StructuredOutputs
from engine.errors import InvalidPrompt
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import Outcome
from jobs.requests import DEFAULT_MAX_TOKENS, ModelLimits
from worker.generation import chat_prompt
from worker.generation.chat_prompt import Message
from worker.generation.prompts import (
    LARGE_TEXT,
    PLAIN,
    Preparation,
    PreparedRequest,
    PromptPreparer,
    Tokens,
)

MODEL = ModelLimits("m", max_model_len=1000, vocab_size=256)


class Letters:
    """A token a letter; "!" is a letter that it does not know. `begin` is its special token."""

    def __init__(
        self, template: str = "{% for message in messages %}{{ message.content }}{% endfor %}", *, begin: str = ""
    ) -> None:
        self.begin = begin
        self.chat_template = template
        self._template = ImmutableSandboxedEnvironment().from_string(template)
        self.batches: list[list[str]] = []

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Tokens]:
        self.batches.append(list(texts))
        begin = self.begin if add_special_tokens else ""
        return [InvalidPrompt("no token for !") if "!" in text else list((begin + text).encode()) for text in texts]

    def render_chat(self, messages: Sequence[Message], **template_options: object) -> str:
        return self._template.render(messages=messages, **template_options)

    def least_tokens(self, text: str) -> int:
        return len(text)


def claimed(line: int, body: object, job: int = 1) -> ClaimedRequest:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return ClaimedRequest(UUID(int=job), line, 1, UUID(int=2), UUID(int=3), raw)


def prepare(*bodies: object, tokenizer: Letters | None = None) -> Preparation:
    preparer = PromptPreparer(MODEL, tokenizer)
    return preparer.prepare([claimed(line, body) for line, body in enumerate(bodies, 1)])


def error(outcome: Outcome) -> dict[str, str]:
    found: dict[str, str] = orjson.loads(outcome.body)["response"]["body"]["error"]
    return found


def test_prompts_of_all_forms_keep_their_order() -> None:
    bodies = [{"prompt": "ab"}, {"messages": [{"role": "user", "content": "cd"}]}, {"prompt": [7]}, {"prompt": "e"}]
    result = prepare(*bodies, tokenizer=Letters())
    assert result.refused == []
    assert [item.request.line for item in result.prepared] == [1, 2, 3, 4]
    assert [item.token_ids for item in result.prepared] == [[97, 98], [99, 100], [7], [101]]
    assert [item.is_chat for item in result.prepared] == [False, True, False, False]


def test_bad_line_is_refused_alone_and_under_its_own_claim() -> None:
    result = prepare({"prompt": "ab"}, {"prompt": "a!"}, b"not json", {"prompt": "c"}, tokenizer=Letters())
    assert [item.request.line for item in result.prepared] == [1, 4]
    assert [outcome.token.line for outcome in result.refused] == [2, 3]
    assert [error(outcome)["code"] for outcome in result.refused] == ["invalid_request", "invalid_request"]
    assert error(result.refused[0])["message"] == "no token for !"


def test_text_is_refused_when_the_model_has_no_tokenizer() -> None:
    result = prepare({"prompt": "ab"}, {"messages": []}, {"prompt": [1]})
    assert [item.request.line for item in result.prepared] == [3]
    assert all("has no tokenizer" in error(outcome)["message"] for outcome in result.refused)


def test_prompt_and_answer_must_fit_the_context() -> None:
    result = prepare(
        {"prompt": [1] * 990, "max_tokens": 10}, {"prompt": [1] * 990, "max_tokens": 11}, {"prompt": [1] * 1000}
    )
    assert [item.request.line for item in result.prepared] == [1]
    assert {error(outcome)["code"] for outcome in result.refused} == {"context_length_exceeded"}
    assert "990 prompt tokens and max_tokens 11 exceed the context of 1000" in error(result.refused[0])["message"]


def test_answer_without_max_tokens_is_bounded_by_the_default_and_the_context() -> None:
    result = prepare({"prompt": [1]}, {"prompt": [1] * 990})
    assert [item.params.max_tokens for item in result.prepared] == [DEFAULT_MAX_TOKENS, 10]


def test_seed_is_the_lines_own_and_the_same_after_another_claim() -> None:
    first, second = prepare({"prompt": [1]}, {"prompt": [1]}).prepared
    assert first.params.seed != second.params.seed
    again = PromptPreparer(MODEL, None).prepare(
        [ClaimedRequest(UUID(int=1), 1, 9, UUID(int=8), UUID(int=3), b'{"prompt": [1]}')]
    )
    assert again.prepared[0].params.seed == first.params.seed


def test_unknown_option_is_a_server_error_that_does_not_quote_the_line() -> None:
    result = prepare({"prompt": [1], "novel": "secret"})
    assert b"secret" not in result.refused[0].body
    assert orjson.loads(result.refused[0].body)["response"]["status_code"] == 500


def test_line_that_the_api_refused_is_settled_with_its_error() -> None:
    refusal = {"message": "above 2", "code": "invalid_request", "param": "temperature"}
    result = prepare({"refused": refusal}, {"prompt": [1]})
    assert [item.request.line for item in result.prepared] == [2]
    assert error(result.refused[0]) == refusal | {"type": "invalid_request_error"}


def test_parameters_become_the_engines_own() -> None:
    result = prepare({"prompt": [1], "n": 3, "logit_bias": {"5": -100}, "echo": True, "logprobs": 2, "max_tokens": 0})
    params = result.prepared[0].params
    assert (params.n, params.logit_bias, params.echo, params.max_tokens) == (3, {5: -100}, True, 0)
    assert (params.logprobs, params.prompt_logprobs) == (2, 2)


HANGING = """{% for message in messages %}{% if message.content == "hang" %}
{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}
{% endif %}{{ message.content }}{% endfor %}"""


def chat(content: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}]}


def test_template_that_takes_too_long_costs_its_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_prompt, "TEMPLATE_LIMIT", 0.3)
    preparer = PromptPreparer(MODEL, Letters(HANGING))
    requests = [
        claimed(1, chat("a")),
        claimed(2, chat("hang")),
        claimed(3, chat("hang")),
        claimed(4, {"prompt": "b"}),
        claimed(5, chat("c"), job=2),
    ]
    result = preparer.prepare(requests)
    assert [outcome.token.line for outcome in result.refused] == [2]
    assert error(result.refused[0])["message"] == "the chat template took more than 0.3 s"
    # Its job's other conversations come again, one limit a claim; other jobs and forms go on.
    assert [request.line for request in result.postponed] == [3]
    assert [item.request.line for item in result.prepared] == [1, 4, 5]


def test_text_beyond_the_context_is_refused_without_tokenization() -> None:
    tokenizer = Letters()
    result = prepare({"prompt": "a" * (LARGE_TEXT + 1)}, {"prompt": "b"}, chat("c" * (4 << 20)), tokenizer=tokenizer)
    assert [item.request.line for item in result.prepared] == [2]
    assert {error(outcome)["code"] for outcome in result.refused} == {"context_length_exceeded"}
    assert "at least 65537 prompt tokens exceed the context" in error(result.refused[0])["message"]
    assert {text for batch in tokenizer.batches for text in batch} == {"b"}


def test_large_texts_are_tokenized_one_at_a_time_and_named_before() -> None:
    tokenizer = Letters()
    large = "a" * (LARGE_TEXT + 1)
    named: list[tuple[int, ...]] = []
    model = ModelLimits("m", max_model_len=1 << 20, vocab_size=256)
    preparer = PromptPreparer(
        model, tokenizer, on_progress=lambda: named.append(tuple(request.line for request in preparer.in_work))
    )
    preparer.prepare([claimed(line, {"prompt": text}) for line, text in enumerate(["b", large, "c", large], 1)])
    assert tokenizer.batches[:3] == [["b", "c"], [large], [large]]
    assert {(1, 3), (2,), (4,)} <= set(named)
    assert preparer.in_work == ()


def test_text_far_beyond_the_context_is_refused_by_its_beginning_when_no_bound_is_known() -> None:
    class Boundless(Letters):
        def least_tokens(self, text: str) -> int:
            return 0

    tokenizer = Boundless()
    result = prepare({"prompt": "a" * 4_000_000}, {"prompt": "b"}, tokenizer=tokenizer)
    assert [item.request.line for item in result.prepared] == [2]
    assert error(result.refused[0])["code"] == "context_length_exceeded"
    assert max(len(text) for batch in tokenizer.batches for text in batch) == LARGE_TEXT


TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
ASKED = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 9}


def prompt(body: object, template: str) -> tuple[str, PreparedRequest]:
    (prepared,) = prepare(body, tokenizer=Letters(template)).prepared
    return bytes(prepared.token_ids).decode(), prepared


def test_template_sees_tools_unless_none_may_be_called() -> None:
    template = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
    assert prompt(ASKED | {"tools": [TOOL]}, template)[0] == "now"
    assert prompt(ASKED | {"tools": [TOOL], "tool_choice": "none"}, template)[0] == ""


def test_template_options_reach_the_template() -> None:
    body = ASKED | {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}}
    assert prompt(body, "{{ enable_thinking }} {{ reasoning_effort }}")[0] == "False low"


def test_generation_prompt_and_continuation_reach_the_template_of_their_request() -> None:
    template = "{{ add_generation_prompt }} {{ continue_final_message }}"
    assert prompt(ASKED | {"add_generation_prompt": False}, template)[0] == "False "
    assert prompt(ASKED | {"continue_final_message": True}, template)[0] == "False True"
    assert prompt(ASKED | {"continue_final_message": False, "add_generation_prompt": True}, template)[0] == "True "


def test_special_tokens_are_added_where_they_are_asked_for() -> None:
    bodies = [
        body | choice
        for body in ({"prompt": "p"}, chat("c"))
        for choice in ({}, {"add_special_tokens": True}, {"add_special_tokens": False})
    ]
    tokenizer = Letters(begin="^")
    texts = [bytes(item.token_ids).decode() for item in prepare(*bodies, tokenizer=tokenizer).prepared]
    assert texts == ["^p", "^p", "p", "c", "^c", "c"]


def test_continued_reasoning_is_told_from_continued_content() -> None:
    template = "{# <think></think> #}{% for message in messages %}{{ message.content }}{% endfor %}"
    for said, is_thinking in (("<think>\nhm", True), ("<think>hm</think>so", False), ("so", False)):
        body = {"messages": [{"role": "assistant", "content": said}], "continue_final_message": True}
        assert prompt(body, template)[1].form.is_thinking is is_thinking, said


def test_prompt_that_begins_reasoning_is_told_from_one_that_leaves_it_open() -> None:
    assert prompt(ASKED, "{# </think> #}<think>\n")[1].form.is_thinking
    open_form = prompt(ASKED, "{# <think></think> #}a")[1].form
    assert (open_form.thinks, open_form.is_thinking) == (True, False)
    assert not prompt(ASKED, "a")[1].form.thinks


def test_forced_call_of_mistral_s_begins_in_the_prompt() -> None:
    body = ASKED | {"tools": [TOOL], "tool_choice": "required"}
    text, prepared = prompt(body, "{# [TOOL_CALLS] #}a")
    assert (text, prepared.form.is_calling) == ("a[TOOL_CALLS]", True)
    assert prepared.params.skip_special_tokens is False


def test_caller_s_own_grammar_is_all_content() -> None:
    body = ASKED | {"tools": [TOOL], "structured_outputs": {"regex": "a"}}
    _, prepared = prompt(body, "{# <think></think> #}<think>")
    assert prepared.form == PLAIN
    assert prepared.params.structured_outputs == StructuredOutputs(regex="a")


def test_replayed_arguments_that_are_no_object_are_refused() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "["}}
    body = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    result = prepare(body, {"prompt": "b"}, tokenizer=Letters())
    assert [item.request.line for item in result.prepared] == [2]
    assert error(result.refused[0])["message"] == "the arguments of a tool call are no JSON object"
