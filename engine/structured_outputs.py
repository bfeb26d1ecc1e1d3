"""What form an output must have."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import InvalidParams

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]

MAX_SOURCE_BYTES = 131_072
"""Of a schema, a regex, a grammar, or all choices together: costs grow with it."""

MAX_CHOICES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """The form of one request's output; exactly one field is given. Names are those of vLLM.

    Every token that would leave the form is banned, so a finished output has it. An output that `max_tokens` cuts is
    only the beginning of one. Raises `InvalidParams`; whether a schema, regex or grammar makes sense is found out when
    it is compiled.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, an object or its text."""

    json_object: bool | None = None
    """True: any JSON object."""

    regex: str | None = None
    """The whole output matches it. Syntax of Rust's `regex`: no look-around, no back-references."""

    choice: Sequence[str] | None = None
    """The output is one of these."""

    grammar: str | None = None
    """A context-free grammar: Lark, as llguidance reads it."""

    def __post_init__(self) -> None:
        if (
            sum(value is not None for value in (self.json, self.json_object, self.regex, self.choice, self.grammar))
            != 1
        ):
            raise InvalidParams("structured_outputs wants exactly one of json, json_object, regex, choice and grammar")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        elif self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        elif self.json_object is not None:
            if self.json_object is not True:
                raise InvalidParams("structured_outputs.json_object must be true")
        elif not isinstance(self.regex if self.regex is not None else self.grammar, str):
            raise InvalidParams(f"structured_outputs.{self.kind} must be a string")
        size = _size(self.kind, self.choice if self.choice is not None else (self.source,))
        if size > MAX_SOURCE_BYTES:
            raise InvalidParams(
                f"structured_outputs.{self.kind} has {size} bytes; at most {MAX_SOURCE_BYTES} are allowed"
            )

    @property
    def kind(self) -> Kind:
        if self.json is not None:
            return "json"
        if self.json_object is not None:
            return "json_object"
        if self.regex is not None:
            return "regex"
        return "choice" if self.choice is not None else "grammar"

    @property
    def source(self) -> str:
        """The text of a schema, a regex or a grammar; a JSON list of the choices."""
        if self.choice is not None:
            return json_module.dumps(list(self.choice), ensure_ascii=False)
        if self.json_object is not None:
            return '{"type": "object"}'
        text = self.json if self.json is not None else self.regex if self.regex is not None else self.grammar
        assert isinstance(text, str)
        return text


def _schema_text(schema: object) -> str:
    try:
        document = json_module.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(document, Mapping):
            raise InvalidParams("structured_outputs.json must be a JSON schema: an object, or the text of one")
        return json_module.dumps(dict(document), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, InvalidParams):
            raise
        raise InvalidParams(f"structured_outputs.json is not JSON: {str(error)[:200]}") from error


def _choices(choices: object) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise InvalidParams("structured_outputs.choice must be a list of strings")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidParams(f"structured_outputs.choice must hold 1 to {MAX_CHOICES} strings")
    if not all(isinstance(choice, str) for choice in choices):
        raise InvalidParams("structured_outputs.choice must be a list of strings")
    return tuple(choices)


def _size(kind: Kind, texts: Sequence[str]) -> int:
    try:
        return sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError as error:
        raise InvalidParams(f"structured_outputs.{kind} holds a lone surrogate, which is no character") from error
