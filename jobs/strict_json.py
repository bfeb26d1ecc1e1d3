"""The one JSON parser for everything that callers send.

Python's `json` accepts NaN, duplicate keys, lone surrogates and numbers that no float holds; each of them would come
back later as a 500, or as a document that another reader understands differently. Here they are refused at the door.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import Any, NoReturn

import orjson

from jobs.errors import InvalidJson

MAX_DIGITS = 400  # of one number: beyond a float's range even as a fraction
# Of one document, in the time that a plain value takes, a tenth of a microsecond. What is refused is never built.
MAX_PARTS = 1_000_000
PARTS_OF_STRUCTURE = 10  # of each list, object, field, and number with a fraction or an exponent
# A callback for each whole number takes four times as long, but lets other threads have their turn.
_WITHOUT_CALLBACKS = 4 * 1024 * 1024  # bytes
_DIGITS_AS_ZEROS = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else ord(" ") for byte in range(256))
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(raw: bytes, *, max_depth: int) -> Any:
    """Parse one document. Raises `InvalidJson` with a sentence that says what and where.

    Refused: anything but UTF-8, raw control characters in strings, duplicate keys, NaN and infinities (`1e400` too),
    numbers of more than `MAX_DIGITS` digits, lone surrogates (`"\\ud800"`), nesting deeper than `max_depth`, more than
    `MAX_PARTS` in all. An escaped NUL is a character like any other. Time is linear in `len(raw)`, and 4 MiB take
    about a tenth of a second at most, for any content.
    """
    # Counting marks is quick and bounds what counts from above; only a suspicious document is measured exactly.
    if raw.count(b"[") + raw.count(b"{") > max_depth or _parts(raw) > MAX_PARTS:
        _refuse_many_or_deep(_without_strings(raw), max_depth)
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


def _parts(raw: bytes) -> int:
    """The parts of a document without strings, and at least as many of one with strings."""
    fractions = raw.count(b".") + raw.count(b"e") + raw.count(b"E") - raw.count(b"true") - raw.count(b"false")
    structure = raw.count(b"[") + raw.count(b"{") + raw.count(b":") + fractions
    return raw.count(b",") + PARTS_OF_STRUCTURE * structure


def _without_strings(raw: bytes) -> bytes:
    """What stands between the strings."""
    raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if raw.count(b'"') > 2 * (MAX_PARTS + 1):
        _refuse_many()  # at least a comma or a colon stands between two strings
    # Several times as fast as matching short strings one by one.
    return b"".join(raw.split(b'"')[::2])


def _refuse_many_or_deep(without_strings: bytes, max_depth: int) -> None:
    if _parts(without_strings) > MAX_PARTS:
        _refuse_many()
    brackets = without_strings.translate(None, _NO_BRACKETS)
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise InvalidJson(f"The JSON is nested deeper than {max_depth} levels.")


def _refuse_many() -> NoReturn:
    raise InvalidJson(
        f"The JSON has too many parts: {MAX_PARTS} are allowed, where a list, an object, a field, and a number with a "
        f"fraction or an exponent count as {PARTS_OF_STRUCTURE} each, and any other value as 1."
    )


def _refuse_lone_surrogates(document: Any) -> None:
    with contextlib.suppress(TypeError):  # of a lone surrogate, but of an integer beyond 64 bits as well
        orjson.dumps(document)
        return
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


def _fraction(digits: str) -> float:
    if len(digits) > MAX_DIGITS:
        raise InvalidJson(f"A number has {len(digits)} digits; {MAX_DIGITS} are allowed.")
    value = float(digits)
    if not math.isfinite(value):
        raise InvalidJson(f"The number {digits[:40]} is out of range.")
    return value


def _constant(name: str) -> NoReturn:
    raise InvalidJson(f"{name} is not JSON.")


def _decoder(raw: bytes) -> json.JSONDecoder:
    is_plain = len(raw) <= _WITHOUT_CALLBACKS and b"0" * MAX_DIGITS not in raw.translate(_DIGITS_AS_ZEROS)
    return json.JSONDecoder(
        object_pairs_hook=_object,
        parse_int=int if is_plain else _integer,
        parse_float=_fraction,
        parse_constant=_constant,
    )
