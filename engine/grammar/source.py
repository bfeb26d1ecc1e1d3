"""Translate a request's structured output into the text that llguidance compiles."""

from __future__ import annotations

import json

from llguidance import regex_to_lark

from engine.grammar.json_schema import readable_schema
from engine.structured_outputs import StructuredOutputs

# Blanks between JSON's tokens: a space, or a line break and an indent, so that an output ends. A schema's options
# replace it.
WHITESPACE = {"whitespace_pattern": r"\x20|\x0D?\x0A(\x20{0,32}|\x09{0,16})"}


def grammar_text(wanted: StructuredOutputs, *, forces: bool = False) -> str:
    """Return the text for llguidance; raises ValueError. Quick for every request, because nothing is compiled.

    With `forces`, text that the grammar demands has but one spelling, the tokenizer's; without it, the model chooses.
    """
    source, tail = wanted.source, _tail(forces=forces)
    if wanted.kind in ("json", "json_object"):
        schema = {"x-guidance": WHITESPACE, **readable_schema(json.loads(source))}
        grammars = [{"lark_grammar": f"start: @json{tail}"}, {"name": "json", "json_schema": schema}]
        return json.dumps({"grammars": grammars}, ensure_ascii=False)
    if wanted.kind == "regex":
        return f"start: /{regex_to_lark(source, '')}/{tail}"
    if wanted.kind == "choice":
        choices = " | ".join(_quoted(choice) for choice in json.loads(source))
        return f"start: CHOICE\nCHOICE: {choices}{tail}"
    return f"{source}{tail}"


def _tail(*, forces: bool) -> str:
    """Options stand last, to override a caller's own and to leave line numbers in errors those of the caller's text."""
    return f'\n%llguidance {{"no_forcing": {json.dumps(not forces)}, "allow_invalid_utf8": false}}\n'


def _quoted(text: str) -> str:
    """Quote a string for Lark, whose lexer refuses an unescaped DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
