"""The one JSON parser: what it takes, it takes as Python's own does; the rest it refuses, quickly and in words."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import InvalidJson
from jobs.strict_json import MAX_DIGITS, parse

DEPTH = 8


def refusal(raw: bytes) -> str:
    with pytest.raises(InvalidJson) as refused:
        parse(raw, max_depth=DEPTH)
    return str(refused.value)


# Text may not hold lone surrogates; Hypothesis' st.text() holds none either.
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=50)
@given(documents, st.booleans())
def test_parse_returns_the_document(document: object, is_ascii: bool) -> None:
    raw = json.dumps(document, ensure_ascii=is_ascii).encode()
    assert parse(raw, max_depth=100) == document


@given(st.binary())
def test_parse_returns_or_refuses_any_bytes(raw: bytes) -> None:
    try:
        document = parse(raw, max_depth=DEPTH)
    except InvalidJson:
        return
    json.dumps(document, allow_nan=False).encode()


@given(st.text('[]{}":,\\ud8019aeE+-. \n', max_size=40))
def test_parse_agrees_with_json_on_text_that_looks_like_it(text: str) -> None:
    try:
        document = parse(text.encode(), max_depth=DEPTH)
    except InvalidJson:
        return
    assert json.loads(text) == document


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "Not valid JSON"),
        (b"{", "Not valid JSON"),
        (b"[1,]", "Not valid JSON"),
        (b"[1] 2", "Extra data at position 4"),
        (b"\xff", "Not UTF-8: byte 0xff at position 0"),
        (b'"\xed\xa0\x80"', "Not UTF-8"),
        (b'"\x00"', "control character"),
        (b"NaN", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"1e400", "The number 1e400 is out of range"),
        (b"-1e999", "out of range"),
        (b"9" * (MAX_DIGITS + 1), f"A number has {MAX_DIGITS + 1} digits"),
        (b"0." + b"1" * MAX_DIGITS, "digits"),
        (b'{"a":1,"b":2,"a":3}', "The key 'a' stands twice"),
        (b'{"a":1,"\\u0061":2}', "The key 'a' stands twice"),
        (b'"\\ud800"', "the lone surrogate U+D800"),
        (b'{"\\uDFFF":1}', "the lone surrogate U+DFFF"),
        (b'"\\ude00\\ud83d"', "the lone surrogate U+DE00"),
        (b'[18446744073709551616,"\\ud800"]', "the lone surrogate U+D800"),
    ],
)
def test_refusal_says_what_is_wrong(raw: bytes, what: str) -> None:
    assert what in refusal(raw)


def test_parse_accepts_unusual_json() -> None:
    assert parse(b'"\\ud83d\\ude00"', max_depth=DEPTH) == "\U0001f600"
    assert parse(b'[18446744073709551616,"\\ud83d\\ude00"]', max_depth=DEPTH) == [2**64, "\U0001f600"]
    assert parse(b'"\\u0000"', max_depth=DEPTH) == "\0"
    assert parse(b'"\\\\ud800"', max_depth=DEPTH) == "\\ud800"
    assert parse('"\u2028"'.encode(), max_depth=DEPTH) == "\u2028"
    assert parse(b" \t\r\n1 ", max_depth=DEPTH) == 1
    assert parse(b"1e-400", max_depth=DEPTH) == 0.0


def test_depth_counts_brackets_outside_of_strings() -> None:
    assert parse(b"[" * DEPTH + b"]" * DEPTH, max_depth=DEPTH) is not None
    assert "deeper than 8 levels" in refusal(b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1))
    assert "deeper" in refusal(b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1))
    assert parse(b'"' + b"[{" * 100 + b'"', max_depth=DEPTH)
    assert parse(b'"\\"' + b"[" * 100 + b'"', max_depth=DEPTH)
    assert parse(b"[" + b"[]," * 100 + b"[]]", max_depth=DEPTH)
    # Python's own parser goes no deeper than its stack, even with a larger max_depth.
    with pytest.raises(InvalidJson):
        parse(b"[" * 1_000_000, max_depth=10_000_000)


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'"' + b"[" * 4_000_000,
        b'["' + b"\\" * 200_000,
        b"9" * 200_000,
        b"[" + b'"\\ud800",' * 20_000 + b"1]",
    ],
    ids=["deep", "open", "objects", "open string", "backslashes", "digits", "surrogates"],
)
def test_refusal_takes_linear_time(raw: bytes) -> None:
    # Milliseconds where it is linear; minutes where it is not.
    began = time.thread_time()
    refusal(raw)
    assert time.thread_time() - began < 2
