"""Answers taken apart: whole, and in pieces of any size, which must come to the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.generation.answer_parts import AnswerForm, AnswerParts, reasoning_tokens
from worker.generation.tool_calls import CallFormat, Tools

CALL = '{"name": "add", "arguments": {"a": 1}}'
LLAMA = '{"name": "add", "parameters": {"a": 1}}'
ADD = ("add", '{"a": 1}')


def tools(form: CallFormat = "hermes", *, is_single: bool = False) -> Tools:
    return Tools(form, {"add": {}, "now": {}}, is_forced=False, is_single=is_single)


def taken_apart(form: AnswerForm, *pieces: str) -> AnswerParts:
    parts = AnswerParts(form, "request 0")
    for piece in pieces:
        parts.feed(piece)
    parts.end()
    return parts


def said(parts: AnswerParts) -> tuple[str, str, list[tuple[str, str]]]:
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in parts.calls]
    return parts.reasoning, parts.content, calls


CASES: list[tuple[AnswerForm, str, tuple[str, str, list[tuple[str, str]]]]] = [
    (AnswerForm(), " a <think>b</think>\n", ("", " a <think>b</think>\n", [])),
    (AnswerForm(thinks=True), "<think>\nhm\n</think>\n\nyes\n", ("hm", "yes\n", [])),
    (AnswerForm(thinks=True), "yes <think>", ("", "yes <think>", [])),
    (AnswerForm(thinks=True), "<think>\n\n</think>\n\nyes", ("", "yes", [])),
    (AnswerForm(thinks=True, is_thinking=True), "\nhm</think>yes", ("hm", "yes", [])),
    (AnswerForm(thinks=True, is_thinking=True), "hm </thin", ("hm </thin", "", [])),
    (AnswerForm(tools()), f"so\n<tool_call>\n{CALL}\n</tool_call>\n", ("", "so", [ADD])),
    (AnswerForm(tools()), f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", ("", "", [ADD, ADD])),
    (AnswerForm(tools()), f"<tool_call>\n{CALL}", ("", "", [ADD])),
    (AnswerForm(tools(is_single=True)), f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>", ("", "", [ADD])),
    (AnswerForm(tools()), "a\n<tool_call>{</tool_call> b", ("", "a\n<tool_call>{</tool_call> b", [])),
    (AnswerForm(tools()), '<tool_call>{"name": "rm"}</tool_call>', ("", '<tool_call>{"name": "rm"}</tool_call>', [])),
    (AnswerForm(tools()), "a <tool", ("", "a <tool", [])),
    (AnswerForm(tools(), thinks=True), f"<think>x</think><tool_call>{CALL}</tool_call>", ("x", "", [ADD])),
    (AnswerForm(tools("llama")), f"\n{LLAMA}; {LLAMA}", ("", "", [ADD, ADD])),
    (AnswerForm(tools("llama")), "{so it is}", ("", "{so it is}", [])),
    (AnswerForm(tools("llama")), "1 {", ("", "1 {", [])),
    (AnswerForm(tools("mistral")), f"[TOOL_CALLS][{CALL}, {CALL}]", ("", "", [ADD, ADD])),
    (AnswerForm(tools("mistral")), f"so [TOOL_CALLS] [{CALL}]", ("", "so", [ADD])),
    (AnswerForm(tools("mistral")), "a [TOOL_CALLS]b", ("", "a [TOOL_CALLS]b", [])),
    (AnswerForm(tools("mistral"), is_calling=True), f"[{CALL}]", ("", "", [ADD])),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_text_is_taken_apart(form: AnswerForm, text: str, expected: object) -> None:
    assert said(taken_apart(form, text)) == expected


@given(
    st.sampled_from([form for form, _, _ in CASES]),
    st.lists(
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "<tool_call>",
                "</tool_call>",
                "[TOOL_CALLS]",
                "[",
                "]",
                CALL,
                LLAMA,
                " ",
                "\n",
                "a",
                "<",
            ]
        ),
        max_size=8,
    ).map("".join),
    st.lists(st.integers(1, 12), min_size=1),
)
def test_pieces_come_to_the_whole_and_are_never_taken_back(form: AnswerForm, text: str, sizes: list[int]) -> None:
    parts, at, turn = AnswerParts(form, "request 0"), 0, 0
    before: dict[str, Any] = {}
    while at < len(text):
        size = sizes[turn % len(sizes)]
        parts.feed(text[at : at + size])
        at, turn = at + size, turn + 1
        now = {"reasoning": parts.reasoning, "content": parts.content, "calls": list(parts.calls)}
        assert all(now[name][: len(value)] == value for name, value in before.items())
        before = now
    parts.end()
    assert parts.message() == taken_apart(form, text).message()
    assert all(parts.__dict__[name][: len(value)] == value for name, value in before.items())


def test_message_has_the_clients_shape() -> None:
    message = taken_apart(AnswerForm(tools()), f"<tool_call>{CALL}</tool_call>").message()
    (call,) = message.pop("tool_calls")
    assert message == {"role": "assistant", "content": None, "refusal": None}
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert taken_apart(AnswerForm(), "").message() == {"role": "assistant", "content": "", "refusal": None}


def test_ids_differ_between_calls_and_are_the_same_again() -> None:
    text = f"<tool_call>{CALL}</tool_call>" * 2
    ids = [call["id"] for call in taken_apart(AnswerForm(tools()), text).calls]
    assert len(set(ids)) == 2
    assert [call["id"] for call in taken_apart(AnswerForm(tools()), *text).calls] == ids


@pytest.mark.parametrize(
    ("reason", "text", "told"), [("stop", CALL, "tool_calls"), ("length", CALL, "length"), ("stop", "", "stop")]
)
def test_finish_reason_is_that_of_calls(reason: str, text: str, told: str) -> None:
    assert taken_apart(AnswerForm(tools()), f"<tool_call>{text}").finish_reason(reason) == told


@pytest.mark.parametrize(
    ("form", "text", "count"),
    [
        (AnswerForm(thinks=True), "<think>ab</think>cd", 17),
        (AnswerForm(thinks=True), "ab</think>", 0),
        (AnswerForm(thinks=True, is_thinking=True), "ab</think>cd", 10),
        (AnswerForm(thinks=True, is_thinking=True), "ab", 2),
    ],
)
def test_reasoning_is_counted_with_its_marks(form: AnswerForm, text: str, count: int) -> None:
    assert reasoning_tokens(list(text.encode()), lambda token: bytes([token]), form) == count
