"""From stored lines to tokens and parameters, without a thread and without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import orjson

from engine.errors import InvalidPrompt
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import Outcome
from jobs.requests import DEFAULT_MAX_TOKENS, ModelLimits
from worker.generation.prompts import Message, Preparation, PromptPreparer, Tokens

MODEL = ModelLimits("m", max_model_len=1000, vocab_size=256)


class Letters:
    """A token a letter; "!" is a letter that it does not know."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return [InvalidPrompt("no token for !") if "!" in text else list(text.encode()) for text in texts]

    def encode_chat_batch(self, conversations: Sequence[Sequence[Message]]) -> list[Tokens]:
        return self.encode_batch(["".join(message["content"] for message in messages) for messages in conversations])


def claimed(line: int, body: object) -> ClaimedRequest:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return ClaimedRequest(UUID(int=1), line, 1, UUID(int=2), UUID(int=3), raw)


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
