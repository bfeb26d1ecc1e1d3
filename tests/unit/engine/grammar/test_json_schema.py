"""Schemas as llguidance gets them: what is dropped, what is spelled out, and that no output ends half way."""

from __future__ import annotations

import json
import random
import re
from itertools import product
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from engine import StructuredOutputs
from engine.grammar.json_schema import FORMATS, finite_language, readable_schema
from engine.grammar.source import grammar_text
from engine.grammar.vocabulary import Vocabulary

VOCABULARY = Vocabulary([bytes([byte]) for byte in range(128)], (), {0}, 128)
INTEGER = {"type": "integer"}
CLOSED = {"type": "object", "additionalProperties": False}


def matcher(schema: dict[str, Any]) -> LLMatcher:
    text = grammar_text(StructuredOutputs(json=schema))
    started = LLMatcher(VOCABULARY.for_llguidance, text, log_level=0)
    assert not started.is_error(), started.get_error()
    return started


def accepts(schema: dict[str, Any], document: object) -> bool:
    state = matcher(schema)
    tokens = json.dumps(document, separators=(",", ":")).encode()
    return all(state.consume_token(token) for token in tokens) and state.is_accepting()


def random_output(schema: dict[str, Any], seed: int) -> object:
    """Walk to the end over tokens that are likely to spell the names and to close what is open."""
    state, draw, text = matcher(schema), random.Random(seed), bytearray()
    while not state.is_stopped():
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little"))
        assert not state.is_error(), f"a dead end after {text.decode()}"
        allowed = allowed[allowed < VOCABULARY.end_id]
        if state.is_accepting() or not len(allowed):
            break
        likely = [token for token in allowed if token in b'{}":,abfo1']
        token = int(draw.choice(likely or list(allowed)) if draw.random() < 0.9 else draw.choice(list(allowed)))
        assert state.consume_token(token)
        text.append(token)
    return json.loads(text)


@pytest.mark.parametrize(
    "schema",
    [
        {**CLOSED, "properties": {"foo": INTEGER}, "patternProperties": {"^foo$": INTEGER}},
        {**CLOSED, "properties": {"a": INTEGER, "b": INTEGER}, "patternProperties": {"^a$": {}, "^b$": {}}},
        {**CLOSED, "properties": {"a": INTEGER, "b": INTEGER}, "patternProperties": {"^a$|^b$": INTEGER}},
        {**CLOSED, "required": ["foo"], "patternProperties": {"^fo{2}$": INTEGER}},
        {**CLOSED, "properties": {"foo": INTEGER}, "allOf": [{"patternProperties": {"^foo$": {"minimum": 1}}}]},
        {"allOf": [{"properties": {"foo": INTEGER}}, {**CLOSED, "patternProperties": {"^foo$": INTEGER}}]},
        {**CLOSED, "properties": {"o": {**CLOSED, "properties": {"a": {}}, "patternProperties": {"^[a-a]$": INTEGER}}}},
        {**CLOSED, "properties": {"foo": INTEGER}, "patternProperties": {"^f": INTEGER}},
    ],
    ids=json.dumps,
)
def test_outputs_are_finished_when_patterns_match_named_properties(schema: dict[str, Any]) -> None:
    for seed in range(24):
        random_output(schema, seed)


def test_spelled_out_pattern_keeps_its_schema() -> None:
    schema = {**CLOSED, "properties": {"a": INTEGER}, "patternProperties": {"^[ab]$": {"minimum": 5}}}
    assert accepts(schema, {"a": 5})
    assert not accepts(schema, {"a": 4})
    assert accepts(schema, {"a": 5, "b": "any"})
    assert not accepts(schema, {"b": 4})
    assert not accepts(schema, {"c": 5})


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "patternProperties": {"^a$": {}}, "items": {"$ref": "#/patternProperties/^a$"}},
        {"patternProperties": {"^a$": {}, "^b$": {}}, "minProperties": 1},
        {"patternProperties": {"^f": {}, "o$": {}, "(": {}}},
        {"const": {"patternProperties": {"^a$": 1}, "format": "password"}},
    ],
    ids=["referred to", "counted", "infinite", "constant"],
)
def test_schema_is_unchanged_when_not_rewritable(schema: dict[str, Any]) -> None:
    assert readable_schema(schema) == schema


@pytest.mark.parametrize("name", ["password", "binary", "byte", "int32", "uri-reference", "regex", "json-pointer"])
def test_unknown_format_is_ignored(name: str) -> None:
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": name, "minLength": 2}}}
    assert accepts(schema, {"format": "ab"})
    assert not accepts(schema, {"format": "a"})
    assert accepts({"$defs": {"a": {"anyOf": [{"type": "string", "format": name}]}}, "$ref": "#/$defs/a"}, "b")


@pytest.mark.parametrize("name", sorted(FORMATS - {"unknown"}))
def test_known_format_is_enforced(name: str) -> None:
    assert not accepts({"type": "string", "format": name}, "no such thing, #")


@pytest.mark.parametrize(
    ("pattern", "alphabet"),
    [
        ("^foo$", "fo"),
        ("^a?b{1,2}$", "ab"),
        ("^(?:a|[b-c])(d|)$", "abcd"),
        ("^a$|^bc$", "abc"),
        ("^(a$|bc$)", "abc"),
        ("^$", "a"),
        (r"^\d$", "0123456789a"),
    ],
)
def test_finite_language_holds_all_matching_strings(pattern: str, alphabet: str) -> None:
    texts = {"".join(chars) for size in range(4) for chars in product(alphabet, repeat=size)}
    assert finite_language(pattern, 64) == {text for text in texts if re.search(pattern, text)}


@pytest.mark.parametrize(
    "pattern",
    [
        *("foo", "^foo", "foo$", "", "(", "^(a|b)*$", "^.$", "^[^a]$", "^(?i)a$", "^(?=a)a$", "a|^b$", "^(a|b$)"),
        *("^[a-z]{9}$", "^(a{1,60}){60}$", "^(((a{0,9}){0,9}){0,9}){0,9}$", "^" + "(?:a|b)" * 5000 + "$"),
        "^" + "(" * 5000,
    ],
)
def test_finite_language_is_none_when_infinite_large_or_unsure(pattern: str) -> None:
    assert finite_language(pattern, 64) is None
