"""The one JSON parser for everything that callers send.

Python's `json` accepts NaN, duplicate keys, lone surrogates and numbers that no float holds; each of them would come
back later as a 500, or as a document that another reader understands differently. Here they are refused at the door.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from jobs.errors import InvalidJson

MAX_DIGITS = 400  # of one number: beyond a float's range even as a fraction
# Of one document. Each costs up to a microsecond and a hundred bytes, also where the schema refuses it afterwards.
MAX_CONTAINERS = 200_000  # lists and objects
MAX_FIELDS = 200_000  # of all objects together
MAX_FRACTIONS = 200_000  # numbers that are not whole
# A callback for each whole number takes four times as long, but lets other threads have their turn.
_WITHOUT_CALLBACKS = 4 * 1024 * 1024  # bytes
_DIGITS_AS_ZEROS = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else ord(" ") for byte in range(256))
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
# Strings match a run at a time, without backtracking: character by character, a long one would cost a second.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(raw: bytes, *, max_depth: int) -> Any:
    """Parse one document. Raises `InvalidJson` with a sentence that says what and where.

    Refused: anything but UTF-8, raw control characters in strings, duplicate keys, NaN and infinities (`1e400` too),
    numbers of more than `MAX_DIGITS` digits, lone surrogates (`"\\ud800"`), nesting deeper than `max_depth`, more than
    `MAX_CONTAINERS` lists and objects with `MAX_FIELDS` fields, more than `MAX_FRACTIONS` numbers with a fraction or an
    exponent. An escaped NUL is a character like any other. Time is linear in `len(raw)`.
    """
    # Counting marks is quick and bounds what counts from above; only a suspicious document is measured exactly.
    if raw.count(b"[") + raw.count(b"{") > max_depth or raw.count(b":") > MAX_FIELDS:
        _refuse_many_or_deep(_STRING.sub(b"", raw), max_depth)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"Not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}.") from None
    try:
        document = _decoder(raw).decode(text)
    except json.JSONDecodeError as error:
        raise InvalidJson(f"Not valid JSON: {error.msg} at position {error.pos}.") from None
    except RecursionError:  # max_depth was set beyond what Python's own parser can follow
        raise InvalidJson("The JSON is nested too deeply.") from None
    if _SURROGATE.search(raw) is not None:
        _refuse_lone_surrogates(document)
    return document


def _refuse_many_or_deep(without_strings: bytes, max_depth: int) -> None:
    if without_strings.count(b":") > MAX_FIELDS:
        raise InvalidJson(f"The objects of the JSON hold more than {MAX_FIELDS} fields.")
    brackets = without_strings.translate(None, _NO_BRACKETS)
    if brackets.count(b"[") + brackets.count(b"{") > MAX_CONTAINERS:
        raise InvalidJson(f"The JSON holds more than {MAX_CONTAINERS} lists and objects.")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise InvalidJson(f"The JSON is nested deeper than {max_depth} levels.")


def _refuse_lone_surrogates(document: Any) -> None:
    try:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        lone = ord(error.object[error.start])
        raise InvalidJson(f"A string holds the lone surrogate U+{lone:04X}, which is no character.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidJson(f"The key {key[:100]!r} stands twice in one object.")
            seen.add(key)
    return document


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise InvalidJson(f"A number has {len(digits)} digits; {MAX_DIGITS} are allowed.")
    return int(digits)


def _fraction_reader() -> Callable[[str], float]:
    count = 0

    def read(digits: str) -> float:
        nonlocal count
        count += 1
        if count > MAX_FRACTIONS:
            raise InvalidJson(f"The JSON holds more than {MAX_FRACTIONS} numbers with a fraction or an exponent.")
        if len(digits) > MAX_DIGITS:
            raise InvalidJson(f"A number has {len(digits)} digits; {MAX_DIGITS} are allowed.")
        value = float(digits)
        if not math.isfinite(value):
            raise InvalidJson(f"The number {digits[:40]} is out of range.")
        return value

    return read


def _constant(name: str) -> NoReturn:
    raise InvalidJson(f"{name} is not JSON.")


def _decoder(raw: bytes) -> json.JSONDecoder:
    is_plain = len(raw) <= _WITHOUT_CALLBACKS and b"0" * MAX_DIGITS not in raw.translate(_DIGITS_AS_ZEROS)
    return json.JSONDecoder(
        object_pairs_hook=_object,
        parse_int=int if is_plain else _integer,
        parse_float=_fraction_reader(),
        parse_constant=_constant,
    )
