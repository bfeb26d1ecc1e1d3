"""From what a request asks for to the text that llguidance compiles."""

from __future__ import annotations

import json

from llguidance import regex_to_lark

from engine.grammar.json_schema import readable_schema
from engine.structured_outputs import StructuredOutputs

# Tokens are not forced: the model chooses how to spell what the grammar demands, as it would without one. The last word
# counts, so that a caller's own options do not undo ours; and the lines of an error are the caller's.
_TAIL = '\n%llguidance {"no_forcing": true, "allow_invalid_utf8": false}\n'

# Between JSON's marks. A model may indent, but cannot go on with blanks for ever. A schema's own options replace it.
_WHITESPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}


def grammar_text(wanted: StructuredOutputs) -> str:
    """The text that llguidance reads. Quick for any request, because nothing is compiled yet."""
    source = wanted.source
    if wanted.kind in ("json", "json_object"):
        schema = {"x-guidance": _WHITESPACE, **readable_schema(json.loads(source))}
        grammars = [{"lark_grammar": f"start: @json{_TAIL}"}, {"name": "json", "json_schema": schema}]
        return json.dumps({"grammars": grammars}, ensure_ascii=False)
    if wanted.kind == "regex":
        return f"start: /{regex_to_lark(source, '')}/{_TAIL}"
    if wanted.kind == "choice":
        choices = " | ".join(_quoted(choice) for choice in json.loads(source))
        return f"start: CHOICE\nCHOICE: {choices}{_TAIL}"
    return f"{source}{_TAIL}"


def _quoted(text: str) -> str:
    """A string of Lark's, whose lexer takes no DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
