"""The one JSON parser for everything that callers send.

Python's `json` accepts NaN, duplicate keys, lone surrogates and numbers that no float holds; each of them would come
back later as a 500, or as a document that another reader understands differently. Here they are refused at the door.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from jobs.errors import InvalidJson

MAX_DIGITS = 400  # of one number: beyond a float's range even as a fraction
# Strings match a run at a time, without backtracking: character by character, a long one would cost a second.
_BRACKET_OR_STRING = re.compile(rb'[\[\]{}]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(raw: bytes, *, max_depth: int) -> Any:
    """Parse one document. Raises `InvalidJson` with a sentence that says what and where.

    Refused: anything but UTF-8, raw control characters in strings, duplicate keys, NaN and infinities (`1e400` too),
    numbers of more than `MAX_DIGITS` digits, lone surrogates (`"\\ud800"`), nesting deeper than `max_depth`. An escaped
    NUL is a character like any other. Time is linear in `len(raw)`.
    """
    # Counting brackets is quick and bounds the depth from above; only a suspicious document is measured exactly.
    if raw.count(b"[") + raw.count(b"{") > max_depth and _is_deeper_than(max_depth, raw):
        raise InvalidJson(f"The JSON is nested deeper than {max_depth} levels.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"Not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}.") from None
    try:
        document = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InvalidJson(f"Not valid JSON: {error.msg} at position {error.pos}.") from None
    except RecursionError:  # max_depth was set beyond what Python's own parser can follow
        raise InvalidJson("The JSON is nested too deeply.") from None
    if _SURROGATE.search(raw) is not None:
        _refuse_lone_surrogates(document)
    return document


def _is_deeper_than(limit: int, raw: bytes) -> bool:
    depth = 0
    for match in _BRACKET_OR_STRING.finditer(raw):
        token = match.group()
        if token in (b"[", b"{"):
            depth += 1
            if depth > limit:
                return True
        elif token in (b"]", b"}"):
            depth -= 1
    return False


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


def _float(digits: str) -> float:
    if len(digits) > MAX_DIGITS:
        raise InvalidJson(f"A number has {len(digits)} digits; {MAX_DIGITS} are allowed.")
    value = float(digits)
    if not math.isfinite(value):
        raise InvalidJson(f"The number {digits[:40]} is out of range.")
    return value


def _constant(name: str) -> NoReturn:
    raise InvalidJson(f"{name} is not JSON.")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)
