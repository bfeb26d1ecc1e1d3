"""OpenAI's strict mode for the schema of a function's arguments: an object has all properties that it names, no others.

`/v1/responses` puts the schema of a function without `strict` into this mode. One that has no such form is not
enforced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_KEPT = frozenset(
    [
        "$comment",
        "$id",
        "$ref",
        "$schema",
        "const",
        "default",
        "deprecated",
        "description",
        "enum",
        "examples",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "maxItems",
        "maxLength",
        "maximum",
        "minItems",
        "minLength",
        "minimum",
        "multipleOf",
        "readOnly",
        "title",
        "type",
        "writeOnly",
    ]
)
_OBJECTS = frozenset(["additionalProperties", "properties", "required"])
_DEFINITIONS = ("$defs", "definitions")
_SHAPES = frozenset(["type", "enum", "const", "anyOf", "$ref"])  # without one of them a schema allows everything
# Looking around, groups with options, and references to groups: not every engine of regular expressions has them.
_UNUSUAL_PATTERN = re.compile(r"\(\?|\\[1-9]|\\[bB]")
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


class _NotStrict(Exception):
    """A part of a schema that strict mode does not have."""


def in_strict_mode(schema: object) -> dict[str, Any] | None:
    """The schema of a function's arguments in strict mode; None where it has no such form."""
    if schema is None:
        return dict(NO_ARGUMENTS)
    try:
        strict = _strict(schema)
    except _NotStrict:
        return None
    return strict if strict.get("type") == "object" and "properties" in strict else None


def _strict(schema: object) -> dict[str, Any]:
    if not isinstance(schema, dict) or not schema.keys() & _SHAPES:
        raise _NotStrict
    strict: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in _DEFINITIONS:
            strict[keyword] = _named(value)
        elif keyword == "items":
            strict[keyword] = _strict(value)
        elif keyword == "anyOf" and isinstance(value, list):
            strict[keyword] = [_strict(each) for each in value]
        elif (keyword == "pattern" and _is_usual(value)) or keyword in _KEPT:
            strict[keyword] = value
        elif keyword not in _OBJECTS:
            raise _NotStrict
    kind = schema.get("type")
    if kind == "object" or (isinstance(kind, list) and "object" in kind) or schema.keys() & _OBJECTS:
        strict |= _closed(schema)
    return strict


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of an object: one that allows properties which it does not name stays what it is."""
    if schema.get("additionalProperties", False) is not False or "properties" not in schema:
        raise _NotStrict
    properties, required = _named(schema["properties"]), schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
        raise _NotStrict
    return {"properties": properties, "required": list(properties), "additionalProperties": False}


def _named(schemas: object) -> dict[str, Any]:
    if not isinstance(schemas, dict):
        raise _NotStrict
    return {name: _strict(schema) for name, schema in schemas.items()}


def _is_usual(pattern: object) -> bool:
    if not isinstance(pattern, str) or _UNUSUAL_PATTERN.search(pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True
