"""Schemas in OpenAI's strict mode, and those that have no such form."""

from __future__ import annotations

from typing import Any

import pytest

from api.openai.strict_schemas import in_strict_mode

STRING: dict[str, Any] = {"type": "string"}


def of_x(schema: object, **others: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": schema}, **others}


def strict_of_x(schema: object, **others: Any) -> dict[str, Any]:
    return of_x(schema, required=["x"], additionalProperties=False, **others)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (STRING, STRING),
        ({"type": ["string", "null"], "description": "d"}, {"type": ["string", "null"], "description": "d"}),
        ({"enum": ["a", {"properties": {}}]}, {"enum": ["a", {"properties": {}}]}),
        (of_x(STRING), strict_of_x(STRING)),
        ({"type": "array", "items": of_x(STRING)}, {"type": "array", "items": strict_of_x(STRING)}),
        ({"anyOf": [of_x(STRING), {"type": "null"}]}, {"anyOf": [strict_of_x(STRING), {"type": "null"}]}),
        ({"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"}, {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"}),
        ({"type": "integer", "minimum": 0}, {"type": "integer", "minimum": 0}),
    ],
)
def test_objects_at_any_depth_need_all_their_properties_and_have_no_others(given: object, expected: object) -> None:
    assert in_strict_mode(of_x(given)) == strict_of_x(expected)


def test_definitions_are_put_into_strict_mode_with_what_refers_to_them() -> None:
    node = of_x({"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
    strict_node = strict_of_x({"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
    assert in_strict_mode(of_x({"$ref": "#/$defs/node"}, **{"$defs": {"node": node}})) == strict_of_x(
        {"$ref": "#/$defs/node"}, **{"$defs": {"node": strict_node}}
    )


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"description": "anything"},
        {"type": "object"},
        {"type": "object", "additionalProperties": True, "properties": {}},
        {"type": ["object", "null"], "additionalProperties": STRING},
        {"type": "object", "properties": {"y": STRING}, "required": ["z"]},
        {"type": "object", "properties": {"y": STRING}, "required": "y"},
        {"type": "object", "properties": [STRING]},
        {"type": "object", "properties": {}, "patternProperties": {"^a": STRING}},
        {"type": "object", "properties": {}, "minProperties": 1},
        {"type": "string", "not": {"const": "a"}},
        {"allOf": [STRING], "type": "string"},
        {"type": "string", "pattern": "^(?!a)"},
        {"type": "string", "pattern": "(a)\\1"},
        {"type": "string", "pattern": "("},
        {"type": "array", "items": [STRING]},
        {"anyOf": {"type": "string"}},
    ],
)
def test_part_without_a_strict_form_leaves_the_whole_schema_without_one(schema: object) -> None:
    assert in_strict_mode(of_x(schema)) is None


@pytest.mark.parametrize("schema", [STRING, "x", [], {"anyOf": [of_x(STRING)]}, {"type": ["object", "null"]}])
def test_arguments_that_are_no_object_have_no_strict_form(schema: object) -> None:
    assert in_strict_mode(schema) is None
