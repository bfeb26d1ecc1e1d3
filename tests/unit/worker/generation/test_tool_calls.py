"""Tools on their way into a prompt, and the grammars of calls, checked by llguidance itself."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from engine import StructuredOutputs
from engine.errors import InvalidPrompt
from engine.grammar.source import grammar_text
from engine.grammar.vocabulary import Vocabulary
from tests.unit.engine.tokenization.test_tokenizer import byte_level
from worker.generation.answer_grammar import answer_grammar
from worker.generation.answer_parts import AnswerForm
from worker.generation.tool_calls import CallFormat, call_format, conversation, tools_of

SIZE = {
    "type": "object",
    "properties": {"size": {"$ref": "#/$defs/Size"}},
    "required": ["size"],
    "additionalProperties": False,
    "$defs": {"Size": {"type": "integer"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "grow", "parameters": SIZE}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
TEMPLATES: dict[CallFormat, str] = {
    "hermes": "… <tool_call> …",
    "llama": 'Respond in the format {"name": function name, "parameters": …}',
    "mistral": "[AVAILABLE_TOOLS] … [TOOL_CALLS] …",
}
GROW = {
    "hermes": '<tool_call>\n{"name": "grow", "arguments": {"size": 1}}\n</tool_call>',
    "llama": '{"name": "grow", "parameters": {"size": 1}}',
    "mistral": '[{"name": "grow", "arguments": {"size": 1}}]',
}
FORMATS = list(TEMPLATES)


@cache
def vocabulary() -> tuple[Vocabulary, LLTokenizer]:
    tokenizer = byte_level()
    made = Vocabulary.of(tokenizer, len(tokenizer), {1})
    return made, made.for_llguidance


def holds(grammar: str | None, text: str) -> bool:
    """Whether `text` is all that the grammar asks for."""
    assert grammar is not None
    found, tokenizer = vocabulary()
    matcher = LLMatcher(tokenizer, grammar_text(StructuredOutputs(grammar=grammar)))
    assert not matcher.get_error()
    spelled = [found.tokens.index(bytes([byte])) for byte in text.encode()]
    return matcher.try_consume_tokens(spelled) == len(spelled) and matcher.is_accepting()


def grammar(form: CallFormat, schema: dict[str, Any] | None = None, *, thinking: str = "", **body: Any) -> str | None:
    tools = tools_of({"tools": TOOLS, **body}, TEMPLATES[form])
    return answer_grammar(AnswerForm(tools, thinks=bool(thinking), is_thinking=thinking == "begun"), schema)


@pytest.mark.parametrize("form", FORMATS)
def test_format_is_told_from_the_template(form: CallFormat) -> None:
    assert call_format(TEMPLATES[form]) == form
    assert call_format("{{ messages }}") == "hermes"


@pytest.mark.parametrize("form", FORMATS)
class TestForced:
    def test_required_call_allows_nothing_but_a_call(self, form: CallFormat) -> None:
        demanded = grammar(form, tool_choice="required")
        assert holds(demanded, GROW[form])
        assert not holds(demanded, "Let me see.")
        assert not holds(demanded, GROW[form].replace("grow", "shrink"))

    def test_arguments_keep_to_the_schema(self, form: CallFormat) -> None:
        assert not holds(grammar(form, tool_choice="required"), GROW[form].replace("1", '"1"'))

    def test_named_function_is_called_once(self, form: CallFormat) -> None:
        named = grammar(form, tool_choice={"type": "function", "function": {"name": "now"}})
        now = GROW[form].replace("grow", "now").replace('"size": 1', "")
        assert holds(named, now)
        assert not holds(named, GROW[form])
        assert not holds(named, f"{now}\n{now}")
        assert not holds(named, f"{now}; {now}")

    def test_only_allowed_functions_are_called(self, form: CallFormat) -> None:
        allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
        demanded = grammar(form, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        assert not holds(demanded, GROW[form])


def test_several_calls_come_unless_they_are_refused() -> None:
    two = f"{GROW['hermes']}\n{GROW['hermes']}"
    assert holds(grammar("hermes", tool_choice="required"), two)
    assert not holds(grammar("hermes", tool_choice="required", parallel_tool_calls=False), two)


def test_free_choice_has_no_grammar_until_an_argument_is_strict() -> None:
    assert grammar("hermes") is None
    assert grammar("hermes", tool_choice="none") is None
    strict = [{**tool, "strict": True} for tool in TOOLS]
    free = answer_grammar(AnswerForm(tools_of({"tools": strict}, TEMPLATES["hermes"])), None)
    assert holds(free, "Let me see.")
    assert holds(free, f"Let me see.\n{GROW['hermes']}\n{GROW['hermes']}")
    assert not holds(free, f"Let me see.\n{GROW['hermes'].replace('1', 'null')}")
    free = answer_grammar(AnswerForm(tools_of({"tools": strict}, TEMPLATES["llama"])), None)
    assert holds(free, "Let me see: {")
    assert holds(free, GROW["llama"])
    assert not holds(free, GROW["llama"].replace("1", "null"))


@pytest.mark.parametrize("form", FORMATS)
def test_answer_of_a_schema_may_be_a_call_where_calls_have_marks(form: CallFormat) -> None:
    either = grammar(form, {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]})
    assert holds(either, '{"b": true}')
    assert holds(either, GROW[form]) is (form == "hermes")
    assert not holds(either, '{"b": 1}')


def test_reasoning_may_come_before_what_is_demanded() -> None:
    may, must = (grammar("hermes", tool_choice="required", thinking=thinking) for thinking in ("open", "begun"))
    assert holds(may, GROW["hermes"])
    assert holds(may, f"<think>\nhm <tool_call>\n</think>\n\n{GROW['hermes']}")
    assert not holds(may, f"<think>hm {GROW['hermes']}")
    assert holds(must, f"hm\n</think>\n\n{GROW['hermes']}")
    assert not holds(must, GROW["hermes"])


def replayed(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "grow", "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": "call_1"},
    ]


def test_replayed_arguments_are_objects_to_the_template() -> None:
    asked, answered = conversation(replayed(json.dumps({"size": 1})), TEMPLATES["hermes"])
    assert asked["tool_calls"][0]["function"]["arguments"] == {"size": 1}
    assert asked["tool_calls"][0]["id"] == answered["tool_call_id"] == "call_1"
    with pytest.raises(InvalidPrompt, match="no JSON object"):
        conversation(replayed("[]"), TEMPLATES["hermes"])


def test_ids_have_the_length_that_mistral_s_templates_want() -> None:
    asked, answered = conversation(replayed("{}"), TEMPLATES["mistral"])
    assert asked["tool_calls"][0]["id"] == answered["tool_call_id"]
    assert len(answered["tool_call_id"]) == 9
    assert answered["tool_call_id"].isalnum()
