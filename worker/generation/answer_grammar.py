"""The grammar of a chat's answer: calls that have to be made, strict arguments, an object of a schema; with reasoning
before it where the template knows that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from engine.grammar.json_schema import readable_schema
from engine.grammar.source import WHITESPACE
from worker.generation.answer_parts import THINK_BEGIN, THINK_END, AnswerForm
from worker.generation.tool_calls import HERMES_BEGIN, HERMES_END, Tools

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def answer_grammar(form: AnswerForm, schema: Mapping[str, Any] | None) -> str | None:
    """Lark for the whole answer; None where its text is free. `schema` is that of an answer which is no call.

    Beside a schema, calls are possible in hermes' form alone.
    """
    tools = form.tools
    if tools is not None and tools.is_forced:
        return _grammar(form, "calls", _calls(tools, everything_strict=True))
    if schema is not None:
        rules = [f"object: {_json(schema)}"]
        if tools is None or tools.format != "hermes":
            # Without a mark of text before it, a call cannot be told from the beginning of an object.
            return _grammar(form, "object", rules)
        return _grammar(form, "calls | object", [*rules, *_calls(tools, everything_strict=False)])
    if tools is None or not any(function["strict"] for function in tools.functions.values()):
        return None
    return _free(tools)


def _grammar(form: AnswerForm, answer: str, rules: list[str]) -> str:
    if form.is_thinking:
        beginning, think = "think blanks", f"think[lazy]: /(.|\\n)*/ {_quoted(THINK_END)}"
    elif form.thinks:
        beginning, think = "(think blanks)?", f"think[lazy]: {_quoted(THINK_BEGIN)} /(.|\\n)*/ {_quoted(THINK_END)}"
    else:
        return "\n".join([f"start: {answer}", *rules])
    return "\n".join([f"start: {beginning} ({answer})", think, "blanks: /[\\n ]{0,4}/", *rules])


def _calls(tools: Tools, *, everything_strict: bool) -> list[str]:
    """The rule `calls`, and those that it needs."""
    if tools.format == "hermes":
        again = "" if tools.is_single else ' ("\\n" call)*'
        rules = [f"calls: call{again}", f'call: "{HERMES_BEGIN}\\n" body "\\n{HERMES_END}"']
    elif tools.format == "llama":
        again = "" if tools.is_single else ' ("; " body)*'
        rules = [f"calls: body{again}"]
    else:
        again = "" if tools.is_single else ' (", " body)*'
        rules = [f'calls: "[" body{again} "]"']
    return [*rules, *_bodies(tools, everything_strict=everything_strict)]


def _bodies(tools: Tools, *, everything_strict: bool) -> Iterator[str]:
    """The rule `body`: one call as an object, its name and then its arguments."""
    yield "body: " + " | ".join(f"body_{place}" for place in range(len(tools.functions)))
    arguments = "parameters" if tools.format == "llama" else "arguments"
    for place, (name, function) in enumerate(tools.functions.items()):
        beginning = _quoted(f'{{"name": {json.dumps(name)}, "{arguments}": ')
        schema = function["parameters"] if everything_strict or function["strict"] else _ANY_OBJECT
        yield f'body_{place}: {beginning} arguments_{place} "}}"'
        yield f"arguments_{place}: {_json(schema)}"


def _free(tools: Tools) -> str | None:
    """Any text, in which calls have the right form."""
    bodies = list(_bodies(tools, everything_strict=False))
    if tools.format == "hermes":
        return "\n".join(
            [
                f"start: {'tagged? text' if tools.is_single else 'tagged* text'}",
                f'tagged: marked "\\n" body "\\n{HERMES_END}"',
                f"marked[lazy]: /(.|\\n)*/ {_quoted(HERMES_BEGIN)}",
                "text: /(.|\\n)*/",
                *bodies,
            ]
        )
    if tools.format == "llama":
        again = "" if tools.is_single else ' ("; " body)*'
        return "\n".join([f"start: body{again} | text", r"text: /([^{\s](.|\n)*)?/", *bodies])
    return None  # the mark of Mistral's calls is a special token, and no text


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({"x-guidance": WHITESPACE, **readable_schema(dict(schema))}, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
