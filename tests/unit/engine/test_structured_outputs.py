"""What may be asked for, before anything is compiled."""

from __future__ import annotations

from typing import Any

import pytest

from engine import SamplingParams, StructuredOutputs
from engine.errors import InvalidParams
from engine.structured_outputs import MAX_CHOICES, MAX_SOURCE_BYTES


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "exactly one"),
        ({"regex": "a", "choice": []}, "exactly one"),
        ({"json": 17}, "JSON schema"),
        ({"json": "[1]"}, "JSON schema"),
        ({"json": "{"}, "not JSON"),
        ({"json": "[" * 100_000}, "not JSON"),
        ({"json": {"const": float("nan")}}, "not JSON"),
        ({"json": {"const": "\ud800"}}, "surrogate"),
        ({"json": {"const": {1, 2}}}, "not JSON"),
        ({"json_object": False}, "must be true"),
        ({"json_object": "yes"}, "must be true"),
        ({"regex": 17}, "must be a string"),
        ({"regex": "\ud800"}, "surrogate"),
        ({"choice": []}, "1 to"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "1 to"),
        ({"choice": "yes"}, "list of strings"),
        ({"choice": ["a", 1]}, "list of strings"),
        ({"grammar": ["start: a"]}, "must be a string"),
        ({"regex": "a" * (MAX_SOURCE_BYTES + 1)}, "at most"),
        ({"choice": ["é" * 4096] * 17}, "at most"),
        ({"json": {"const": "a" * MAX_SOURCE_BYTES}}, "at most"),
    ],
    ids=str,
)
def test_invalid_structured_outputs_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidParams, match=complaint):
        StructuredOutputs(**fields)


def test_equal_structured_outputs_have_equal_keys() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    assert StructuredOutputs(json=schema) == StructuredOutputs(json='{"type":"object", "properties":{"b":{},"a":{}}}')
    assert hash(StructuredOutputs(choice=["a", "b"])) == hash(StructuredOutputs(choice=("a", "b")))
    assert StructuredOutputs(regex="a") != StructuredOutputs(grammar="a")
    # The order of properties is the order in which they are written.
    assert StructuredOutputs(json={"properties": {"a": {}, "b": {}}}) != StructuredOutputs(
        json={"properties": {"b": {}, "a": {}}}
    )


def test_empty_regex_is_accepted() -> None:
    assert StructuredOutputs(regex="").source == ""


def test_sampling_params_refuse_structured_outputs_of_another_type() -> None:
    with pytest.raises(InvalidParams, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
