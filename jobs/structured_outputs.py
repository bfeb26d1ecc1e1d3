"""The form that an output must have, as a request states it: `structured_outputs` or OpenAI's `response_format`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from jobs import strict_json
from jobs.errors import InvalidJson
from jobs.strict_model import StrictModel

MAX_STRUCTURE_BYTES = 131_072  # of a schema, a regex, a grammar, or all choices together; the engine's own limit
MAX_CHOICES = 4096
_MAX_SCHEMA_DEPTH = 64


def _schema(value: object) -> object:
    """Parse a JSON schema into an object that can be stored; only the worker can tell whether it can be compiled."""
    if isinstance(value, str):
        if len(value) > MAX_STRUCTURE_BYTES:
            raise ValueError(f"the schema has {len(value)} characters; at most {MAX_STRUCTURE_BYTES} are allowed")
        try:
            value = strict_json.parse(value.encode("utf-8", "surrogatepass"), max_depth=_MAX_SCHEMA_DEPTH)
        except InvalidJson as error:
            raise ValueError(error.message) from None
    if not isinstance(value, dict):
        raise ValueError("a JSON schema is expected here: an object, or the text of one")
    try:
        size = len(orjson.dumps(value))
    except TypeError as error:  # a whole number beyond 64 bits
        raise ValueError(f"the schema cannot be stored: {error}") from None
    if size > MAX_STRUCTURE_BYTES:
        raise ValueError(f"the schema has {size} bytes; at most {MAX_STRUCTURE_BYTES} are allowed")
    return value


def _no_larger(value: str | list[str]) -> str | list[str]:
    size = sum(len(text.encode()) for text in ([value] if isinstance(value, str) else value))
    if size > MAX_STRUCTURE_BYTES:
        raise ValueError(f"{size} bytes; at most {MAX_STRUCTURE_BYTES} are allowed")
    return value


Schema = Annotated[dict[str, Any], BeforeValidator(_schema)]
Structure = Annotated[str, AfterValidator(_no_larger)]


class StructuredOutputs(StrictModel):
    """The form that an output must have: exactly one of these. Names are vLLM's."""

    json_: Schema | None = Field(default=None, alias="json")
    json_object: Literal[True] | None = None
    regex: Structure | None = None
    choice: (
        Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True), AfterValidator(_no_larger)]
        | None
    ) = None
    grammar: Structure | None = None

    @model_validator(mode="after")
    def _one_form(self) -> StructuredOutputs:
        if (
            sum(value is not None for value in (self.json_, self.json_object, self.regex, self.choice, self.grammar))
            != 1
        ):
            raise ValueError("exactly one of 'json', 'json_object', 'regex', 'choice' and 'grammar' is needed")
        return self


class JsonSchema(StrictModel):
    """OpenAI's wrapping of a schema. The output always keeps to it, `strict` or not."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    description: Annotated[str, StringConstraints(max_length=4096)] | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """The form that an output must have, as OpenAI spells it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' is needed with the type 'json_schema', and with no other")
        return self

    def structured_outputs(self) -> StructuredOutputs | None:
        """The equivalent `structured_outputs`; None for plain text."""
        if self.json_schema is not None:
            return StructuredOutputs(json=self.json_schema.schema_)
        return StructuredOutputs(json_object=True) if self.type == "json_object" else None
