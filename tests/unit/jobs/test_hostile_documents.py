"""Hostile documents cost what harmless ones do, however much of them is wrong."""

from __future__ import annotations

import json
import time

import pytest
from pydantic import BaseModel, ValidationError

from jobs import strict_json
from jobs.errors import InvalidInput, InvalidJson
from jobs.requests import JobOptions, ModelLimits, Params, PromptLine, parse_request

MIB = 1024 * 1024
FEW = 24  # complaints: a field has one or two, a list or an unknown field one
MODEL = ModelLimits("demo", max_model_len=128, vocab_size=100)


def filled(before: str, item: str, after: str, size: int = MIB) -> bytes:
    """`item` as often as it fits between two texts."""
    return f"{before}{','.join([item] * ((size - len(before) - len(after)) // (len(item) + 1)))}{after}".encode()


LINES = {
    "messages": filled('{"messages":[', "1", "]}"),
    "messages with unknown fields": filled('{"messages":[', '{"role":"a","content":"","x":"%s"}' % ("y" * 100), "]}"),
    "texts as tokens": filled('{"prompt":[', '"a"', "]}"),
    "negative tokens": filled('{"prompt":[', "-1", "]}"),
    "stop": filled('{"prompt":"a","stop":[', "1", "]}"),
    "stop_token_ids": filled('{"prompt":"a","stop_token_ids":[', '"a"', "]}"),
    "choices": filled('{"prompt":"a","structured_outputs":{"choice":[', "1", "]}}"),
}
UNKNOWN_FIELDS = {
    PromptLine: (
        "{%s}",
        '{"structured_outputs":{%s}}',
        '{"response_format":{"json_schema":{%s}}}',
        '{"messages":[{%s}]}',
    ),
    JobOptions: ("{%s}", '{"params":{%s}}', '{"webhook":{%s}}', '{"metadata":{%s}}'),
}


def complaints(schema: type[BaseModel], document: object) -> int:
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(document)
    return caught.value.error_count()


@pytest.mark.parametrize("raw", LINES.values(), ids=LINES)
def test_wrong_items_cost_one_complaint(raw: bytes) -> None:
    assert complaints(PromptLine, strict_json.parse(raw, max_depth=8)) <= FEW


def test_wrong_webhook_events_cost_one_complaint() -> None:
    raw = filled('{"model":"demo","webhook":{"url":"http://a","events":[', "1", "]}}")
    assert complaints(JobOptions, strict_json.parse(raw, max_depth=8)) <= FEW


@pytest.mark.parametrize(
    ("schema", "around"), [(schema, around) for schema in UNKNOWN_FIELDS for around in UNKNOWN_FIELDS[schema]]
)
def test_unknown_fields_cost_one_complaint(schema: type[BaseModel], around: str) -> None:
    document = strict_json.parse(
        (around % ",".join(f'"k{number}":1' for number in range(50_000))).encode(), max_depth=8
    )
    assert complaints(schema, document) <= FEW


def test_first_unknown_field_is_named_when_there_are_many() -> None:
    with pytest.raises(InvalidInput, match="k0: no such field") as caught:
        parse_request({"prompt": "a"} | {f"k{number}": 1 for number in range(1000)}, 1, Params(), MODEL)
    assert caught.value.param == "k0"


@pytest.mark.parametrize(
    "raw",
    [
        filled("[", "{}", "]", 4 * MIB),
        filled("[", "[[[]]]", "]", 4 * MIB),
        filled("[", "1e9", "]", 4 * MIB),
        filled("[", "0.5", "]", 4 * MIB),
        filled("[", '{"":1}', "]", 4 * MIB),
        filled("[", "1", "]", 4 * MIB),
        filled("[", "true", "]", 8 * MIB),
        filled("[", '""', "]", 4 * MIB),
        filled("[", '":"', "]", 4 * MIB),
        b"{%s}" % b",".join(b'"%d" \t:1' % number for number in range(100_000)),
    ],
    ids=["objects", "lists", "exponents", "fractions", "objects of one field", "numbers", "words", "strings",
         "strings with marks", "fields"],
)  # fmt: skip
def test_document_is_refused_unbuilt_when_it_has_too_many_parts(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "_decoder", None)
    with pytest.raises(InvalidJson, match="too many parts: 1000000 are allowed"):
        strict_json.parse(raw, max_depth=8)


@pytest.mark.parametrize(
    "raw",
    [
        b"[%s]" % b",".join([b"12345"] * 700_000),
        b"[%s]" % b",".join([b'"a: b, c. {}"'] * 200_000),
        b"[%s]" % b",".join([b"true,false"] * 400_000),
        b'["%s"]' % (b'\\"\\\\[e.:{,' * 200_000),
        b"[%s]" % b",".join([b'{"custom_id":"a","prompt":"One, two, three."}'] * 30_000),
    ],
    ids=["token ids", "texts", "words", "escapes", "prompts"],
)
def test_document_is_parsed_when_it_has_as_many_parts_as_are_allowed(raw: bytes) -> None:
    assert strict_json.parse(raw, max_depth=8) == json.loads(raw)


def test_marks_in_strings_are_no_parts() -> None:
    text = "{}[]:,1.5" * 250_000
    assert strict_json.parse(f'["{text}"]'.encode(), max_depth=8) == [text]


@pytest.mark.parametrize("name", ["prompt", "messages"])
def test_list_is_refused_unread_when_it_is_longer_than_the_context(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"129 .* exceed the context of demo") as caught:
        parse_request({name: ["neither"] * 129}, 1, Params(), MODEL)
    assert caught.value.param == name


def test_refusal_of_4_mib_takes_a_fraction_of_a_second() -> None:
    """Before complaints were bounded this took 15 s and a gigabyte on the same machine."""
    began = time.process_time()
    with pytest.raises(InvalidInput):
        parse_request(strict_json.parse(filled('{"messages":[', "1", "]}", 4 * MIB), max_depth=8), 1, Params(), MODEL)
    assert time.process_time() - began < 2
