"""Translate a request's structured output into the text that llguidance compiles."""

from __future__ import annotations

import json

from llguidance import regex_to_lark

from engine.grammar.json_schema import readable_schema
from engine.structured_outputs import StructuredOutputs

# `no_forcing` leaves the model to choose the tokens that spell what the grammar demands. The options stand last, to
# override a caller's own and to leave line numbers in errors those of the caller's text.
_TAIL = '\n%llguidance {"no_forcing": true, "allow_invalid_utf8": false}\n'

# Blanks between JSON's tokens: enough to indent by, and bounded, so that an output ends. A schema's options replace it.
WHITESPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}


def grammar_text(wanted: StructuredOutputs) -> str:
    """Return the text for llguidance; raises ValueError. Quick for every request, because nothing is compiled."""
    source = wanted.source
    if wanted.kind in ("json", "json_object"):
        schema = {"x-guidance": WHITESPACE, **readable_schema(json.loads(source))}
        grammars = [{"lark_grammar": f"start: @json{_TAIL}"}, {"name": "json", "json_schema": schema}]
        return json.dumps({"grammars": grammars}, ensure_ascii=False)
    if wanted.kind == "regex":
        return f"start: /{regex_to_lark(source, '')}/{_TAIL}"
    if wanted.kind == "choice":
        choices = " | ".join(_quoted(choice) for choice in json.loads(source))
        return f"start: CHOICE\nCHOICE: {choices}{_TAIL}"
    return f"{source}{_TAIL}"


def _quoted(text: str) -> str:
    """Quote a string for Lark, whose lexer refuses an unescaped DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
