"""What a line may ask for, and how it is stored."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import structured_outputs
from jobs.errors import InvalidInput
from jobs.requests import (
    MAX_URL_BYTES,
    PREFIX_BYTES,
    JobOptions,
    ModelLimits,
    Params,
    PromptLine,
    StagedLine,
    Webhook,
    parse_request,
    validate,
    window_seconds,
    window_text,
)
from jobs.structured_outputs import MAX_CHOICES, MAX_STRUCTURE_BYTES

MODEL = ModelLimits("demo", max_model_len=100, vocab_size=50)


def test_min_tokens_is_refused_above_the_default_of_max_tokens() -> None:
    model = ModelLimits("large", max_model_len=1000, vocab_size=50)
    for document, defaults in (({"prompt": "a", "min_tokens": 257}, Params()), ("a", Params(min_tokens=257))):
        with pytest.raises(InvalidInput, match="is 256 where it is not given") as refused:
            parse_request(document, 1, defaults, model)
        assert refused.value.param == "min_tokens"
    assert parse_request({"prompt": "a", "min_tokens": 257, "max_tokens": 300}, 1, Params(), model)
    assert parse_request({"prompt": "a", "min_tokens": 256}, 1, Params(), model)
    with pytest.raises(InvalidInput, match="min_tokens 100 exceed the context") as refused:
        stage({"prompt": "a", "min_tokens": 100})
    assert refused.value.param == "min_tokens"


def stage(document: object, defaults: Params = Params(), line: int = 1) -> StagedLine:  # noqa: B008  frozen
    return parse_request(document, line, defaults, MODEL)


def body(document: object, defaults: Params = Params()) -> dict[str, object]:  # noqa: B008  frozen
    stored: dict[str, object] = json.loads(stage(document, defaults).body)
    return stored


def complaint(schema: type[Params] | type[JobOptions] | type[PromptLine], document: object) -> InvalidInput:
    with pytest.raises(InvalidInput) as refused:
        validate(schema, document)
    return refused.value


def test_parameters_of_a_line_override_those_of_its_job() -> None:
    defaults = Params(max_tokens=10, temperature=0.5, stop=["x"])
    assert body({"prompt": "a", "max_tokens": 20, "stop": "y"}, defaults) == {
        "prompt": "a",
        "max_tokens": 20,
        "temperature": 0.5,
        "stop": "y",
    }
    assert body("a") == {"prompt": "a"}
    # null leaves the job's value
    assert body({"prompt": "a", "max_tokens": None}, defaults)["max_tokens"] == 10


def test_custom_id_is_the_line_number_when_not_given() -> None:
    assert stage("a", line=7).custom_id == "request-7"
    assert stage({"prompt": "a", "custom_id": "mine"}, line=7).custom_id == "mine"
    assert "custom_id" not in body({"prompt": "a", "custom_id": "mine"})


def test_prefix_is_equal_for_prompts_with_equal_beginnings() -> None:
    beginning = "x" * PREFIX_BYTES
    assert stage(beginning + "a").prefix == stage(beginning + "b").prefix
    assert stage("a").prefix != stage("b").prefix
    assert stage({"prompt": [1, 2]}).prefix != stage({"prompt": [1, 3]}).prefix
    system = {"role": "system", "content": "y" * PREFIX_BYTES}
    talks = [[system, {"role": "user", "content": text}] for text in ("a", "b")]
    assert len({stage({"messages": talk}).prefix for talk in talks}) == 1
    assert all(-(2**63) <= stage(text).prefix < 2**63 for text in "abcdefgh")


def test_min_and_max_tokens_are_compared_after_merging() -> None:
    with pytest.raises(InvalidInput, match="min_tokens"):
        stage({"prompt": "a", "min_tokens": 11}, Params(max_tokens=10))
    with pytest.raises(InvalidInput, match="min_tokens"):
        stage({"prompt": "a", "max_tokens": 3}, Params(min_tokens=5))
    assert body({"prompt": "a", "min_tokens": 3}, Params(max_tokens=5))["min_tokens"] == 3


@pytest.mark.parametrize(
    ("document", "fits"),
    [
        ({"prompt": [1] * 99, "max_tokens": 1}, True),
        ({"prompt": [1] * 99}, True),
        ({"prompt": [1] * 100}, False),
        ({"prompt": [1] * 90, "max_tokens": 11}, False),
        ({"prompt": "text", "max_tokens": 99}, True),
        ({"prompt": "text", "max_tokens": 100}, False),
        ({"prompt": [49]}, True),
        ({"prompt": [50]}, False),
    ],
)
def test_prompt_is_refused_only_by_what_needs_no_tokenizer(document: dict[str, object], fits: bool) -> None:
    if fits:
        stage(document)
    else:
        with pytest.raises(InvalidInput):
            stage(document)


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ({"prompt": [1, -2]}, "prompt[1]"),
        ({"prompt": [1, "x"]}, "prompt[1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop[1]"),
        ({"prompt": "a", "stop": 5}, "stop"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"prompt": "a", "x y": 1}, "['x y']"),
        ({"prompt": "a", "y" * 5000: 1}, "y" * 300),
        ({}, None),
        (None, None),
    ],
)
def test_complaint_names_its_field(document: object, param: str | None) -> None:
    error = complaint(PromptLine, document)
    assert error.param == param
    assert str(error) == (f"{param}: {error.message}" if param else error.message)
    error.line = 3
    assert str(error).startswith("Line 3: ")


HELLO = {"role": "user", "content": "hello"}
OPEN = {"role": "assistant", "content": "he"}


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ({"prompt": [1], "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        (
            {"messages": [HELLO, OPEN], "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"messages": [HELLO, OPEN | {"content": " "}], "continue_final_message": True}, "continue_final_message"),
        ({"messages": [HELLO, OPEN], "continue_final_message": "yes"}, "continue_final_message"),
    ],
)
def test_end_of_a_prompt_is_refused_by_field_when_impossible(document: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        stage(document)
    assert caught.value.param == param


def test_end_of_a_prompt_is_stored_with_its_line() -> None:
    wanted = {"continue_final_message": True, "add_generation_prompt": False, "add_special_tokens": True}
    assert wanted.items() <= body({"messages": [HELLO, OPEN], **wanted}).items()
    assert "add_special_tokens" in body({"prompt": [1], "add_special_tokens": False})


def test_number_is_refused_when_mistyped_or_out_of_range() -> None:
    for name, wrong in {
        "max_tokens": [-1, 1.5, "5", True, 10**400],
        "temperature": [-1, 11, "1", True, 10**400, float("nan"), float("inf")],
        "top_p": [0, 1.5],
        "top_k": [-1],
        "repetition_penalty": [0, 1e-38, 0.009, 10.1],
        "seed": [-(2**63) - 1, 2**63],
        "n": [0, 129],
        "logit_bias": [{"a": 1}, {"5": 101}, {"5": "1"}, dict.fromkeys(map(str, range(301)), 1)],
        "logprobs": [21],
        "stop_token_ids": [[-1], [2**31], list(range(65)), 1],
    }.items():
        for value in wrong:
            assert (complaint(Params, {name: value}).param or "").startswith(name), (name, value)
    assert validate(Params, {"temperature": 0, "seed": 2**63 - 1, "top_k": 0}).temperature == 0


def test_max_tokens_of_zero_is_allowed_only_with_echo() -> None:
    with pytest.raises(InvalidInput) as refused:
        stage({"prompt": "a", "max_tokens": 0})
    assert refused.value.param == "max_tokens"
    assert json.loads(stage({"prompt": "a", "max_tokens": 0, "echo": True}).body)["max_tokens"] == 0
    with pytest.raises(InvalidInput):
        stage({"messages": [{"role": "user", "content": "a"}], "echo": True})


def test_logit_bias_is_refused_for_a_token_outside_the_vocabulary() -> None:
    with pytest.raises(InvalidInput) as refused:
        stage({"prompt": "a", "logit_bias": {str(2**31): 1}})
    assert refused.value.param == "logit_bias"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from([*PromptLine.model_fields, "other"])


@given(st.dictionaries(fields, json_values, max_size=4) | json_values)
def test_stage_accepts_or_refuses_any_document(document: object) -> None:
    try:
        staged = stage(document, Params(max_tokens=5))
    except InvalidInput:
        return
    assert {"max_tokens"} < set(json.loads(staged.body))
    assert not any(ord(character) < 32 or ord(character) == 127 for character in staged.custom_id)


@pytest.mark.parametrize("url", ["https://example.org/hook?x=1", "http://127.0.0.1:8080", "http://[::1]:80/"])
def test_webhook_url_is_accepted(url: str) -> None:
    assert validate(Webhook, {"url": url}).url == url


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://a", "http://", "http:///a", "http://a:99999", "http://[::1", "http://a b", "http://a\0"]
)
def test_webhook_url_is_refused_when_malformed(url: str) -> None:
    with pytest.raises(InvalidInput, match="url"):
        validate(Webhook, {"url": url})


@given(number=st.integers(1, 9999), unit=st.sampled_from("mhd"))
def test_window_text_is_accepted_as_a_window_again(number: int, unit: str) -> None:
    seconds = window_seconds(f"{number}{unit}")
    text = window_text(seconds)
    assert JobOptions(model="m", completion_window=text).completion_window == text
    assert window_seconds(text) == seconds


def test_webhook_url_is_bounded_in_bytes() -> None:
    prefix = "https://receiver.example/"
    longest = prefix + "字" * ((MAX_URL_BYTES - len(prefix)) // 3)
    assert Webhook(url=longest).url == longest
    for url in (longest + "字", prefix + "a" * MAX_URL_BYTES):
        refused = complaint(Webhook, {"url": url})
        assert refused.param == "url"
        assert f"at most {MAX_URL_BYTES} are allowed" in refused.message


def test_completion_window_is_a_number_and_a_unit() -> None:
    assert [window_seconds(window) for window in ("30m", "24h", "7d")] == [1800, 86400, 604800]
    for window in ("0h", "-1h", "1", "h", "1w", "1h ", "99999h", "1h\n"):
        assert complaint(JobOptions, {"model": "m", "completion_window": window}).param == "completion_window"


class TestForm:
    """The form of the output, in OpenAI's words or vLLM's."""

    def test_output_form_is_stored_in_one_spelling(self) -> None:
        schema = {"type": "object", "properties": {"a": {"enum": [None, "é"]}}, "default": None}
        openai = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        for wanted in (
            {"response_format": openai},
            {"structured_outputs": {"json": schema}},
            {"structured_outputs": {"json": json.dumps(schema)}},
        ):
            assert body({"prompt": "a", **wanted}) == {"prompt": "a", "structured_outputs": {"json": schema}}
        assert body({"prompt": "a", "response_format": {"type": "json_object"}}) == {
            "prompt": "a",
            "structured_outputs": {"json_object": True},
        }

    def test_output_form_of_a_line_overrides_that_of_its_job_in_any_spelling(self) -> None:
        job = Params.model_validate({"response_format": {"type": "json_object"}})
        assert body("a", job)["structured_outputs"] == {"json_object": True}
        assert body({"prompt": "a", "structured_outputs": {"regex": "b"}}, job)["structured_outputs"] == {"regex": "b"}
        assert body({"prompt": "a", "response_format": {"type": "text"}}, job)["structured_outputs"] is None

    @pytest.mark.parametrize(
        ("wanted", "param"),
        [
            ({"response_format": {"type": "xml"}}, "response_format.type"),
            ({"response_format": {"type": "json_schema"}}, "response_format"),
            ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
                "response_format.json_schema.schema",
            ),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": 7}}},
                "response_format.json_schema.schema",
            ),
            ({"structured_outputs": {}}, "structured_outputs"),
            ({"structured_outputs": {"regex": "a", "grammar": "start: a"}}, "structured_outputs"),
            ({"structured_outputs": {"lark": "a"}}, "structured_outputs.lark"),
            ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
            ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
            ({"structured_outputs": {"json": '{"a": 1, "a": 2}'}}, "structured_outputs.json"),
            ({"structured_outputs": {"json": {"maximum": 10**30}}}, "structured_outputs.json"),
            ({"structured_outputs": {"json": {"const": "a" * MAX_STRUCTURE_BYTES}}}, "structured_outputs.json"),
            ({"structured_outputs": {"regex": "é" * MAX_STRUCTURE_BYTES}}, "structured_outputs.regex"),
            ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
            ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice[1]"),
            ({"structured_outputs": {"choice": ["a" * 2**16] * 3}}, "structured_outputs.choice"),
            ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
            ({"structured_outputs": {"json_object": True}, "response_format": {"type": "text"}}, None),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_output_form_is_refused_by_field_when_wrong(self, wanted: dict[str, object], param: str | None) -> None:
        refused = complaint(PromptLine, {"prompt": "a", **wanted})
        assert refused.param == param
        assert len(refused.message) < 200

    def test_limits_of_output_forms_equal_those_of_the_engine(self) -> None:
        assert (MAX_STRUCTURE_BYTES, MAX_CHOICES) == (
            structured_outputs.MAX_SOURCE_BYTES,
            structured_outputs.MAX_CHOICES,
        )
