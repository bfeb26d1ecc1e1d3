"""Rewrite JSON schemas into equal ones that llguidance reads.

A `format` that llguidance does not know is dropped, because it is an annotation. `patternProperties` that only a few
names match become `properties`, because llguidance offers such a name even when all are taken, and finds no way on.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from functools import reduce
from itertools import product
from typing import Any

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Values of `format` that llguidance enforces; the last one allows everything."""

_MAX_NAMES, _MAX_KNOWN_NAMES = 64, 1024
"""Names that a pattern is spelled out in; the second holds where `properties` and `required` cover them all."""

_NO_SCHEMAS = frozenset(("const", "enum", "default", "examples", "required", "x-guidance"))
_NAMED_SCHEMAS = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
)


def readable_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema, rewritten where llguidance would refuse it or run into a dead end."""
    # A reference may point into `properties` or `patternProperties`, which must then stay.
    is_fixed = any("roperties/" in reference for reference in _references(schema))
    rewritten: dict[str, Any] = _rewritten(schema, spells_names=not is_fixed)
    return rewritten


def _rewritten(schema: Any, *, spells_names: bool) -> Any:
    if isinstance(schema, list):
        return [_rewritten(each, spells_names=spells_names) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if keyword in _NO_SCHEMAS:
            result[keyword] = value
        elif keyword in _NAMED_SCHEMAS and isinstance(value, dict):
            result[keyword] = {name: _rewritten(each, spells_names=spells_names) for name, each in value.items()}
        else:
            result[keyword] = _rewritten(value, spells_names=spells_names)
    return _with_names_for_patterns(result) if spells_names else result


def _with_names_for_patterns(schema: dict[str, Any]) -> dict[str, Any]:
    patterns, properties, required = (schema.get(word) for word in ("patternProperties", "properties", "required"))
    if not isinstance(patterns, dict) or not isinstance(properties, dict | None):
        return schema
    properties = dict(properties or {})
    names = properties.keys() | {name for name in required or () if isinstance(name, str)}
    # llguidance counts properties only where all named ones are required.
    most = 0 if {"minProperties", "maxProperties"} & schema.keys() else _MAX_NAMES
    left = {}
    for pattern, its_schema in patterns.items():
        matched = finite_language(pattern, max(most, min(len(names), _MAX_KNOWN_NAMES)))
        if matched is None or not (matched <= names or len(matched) <= most):
            left[pattern] = its_schema
            continue
        for name in sorted(matched):
            properties[name] = {"allOf": [properties[name], its_schema]} if name in properties else its_schema
    return {**schema, "properties": properties, "patternProperties": left} if len(left) < len(patterns) else schema


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for each in schema:
            yield from _references(each)
    elif isinstance(schema, dict):
        for keyword, value in schema.items():
            if keyword == "$ref" and isinstance(value, str):
                yield value
            yield from _references(value)


def finite_language(pattern: str, limit: int) -> frozenset[str] | None:
    """Return all strings in which an ECMA regular expression is found; None for more than `limit`, or if unsure."""
    try:
        parsed = re._parser.parse(pattern)  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError):
        return None
    if parsed.state.flags & ~re.UNICODE.value:
        return None
    try:
        return frozenset(_anchored(list(parsed), limit))
    except (_Unlisted, RecursionError):
        return None


class _Unlisted(Exception):
    """Raised for more strings than the limit, and for constructs that are not spelled out here."""


_SRE = re._constants  # type: ignore[attr-defined]
_BEGINNING, _END = (_SRE.AT, _SRE.AT_BEGINNING), (_SRE.AT, _SRE.AT_END)
_CATEGORIES = {_SRE.CATEGORY_DIGIT: string.digits, _SRE.CATEGORY_WORD: f"{string.ascii_letters}{string.digits}_"}


def _anchored(items: Any, limit: int) -> set[str]:
    """Return what matches between `^` and `$`; without both, an expression is found in infinitely many strings."""
    if items[:1] == [_BEGINNING]:
        return _to_the_end(items[1:], limit)
    if len(items) == 1 and items[0][0] is _SRE.BRANCH:
        return _bounded({text for branch in items[0][1][1] for text in _anchored(list(branch), limit)}, limit)
    raise _Unlisted


def _to_the_end(items: Any, limit: int) -> set[str]:
    if not items:
        raise _Unlisted
    if items[-1] == _END:
        return _sequence(items[:-1], limit)
    kind, value = items[-1]
    branches = value[1] if kind is _SRE.BRANCH else [value[3]] if _is_plain_group(items[-1]) else []
    if not branches:
        raise _Unlisted
    endings = {text for branch in branches for text in _to_the_end(list(branch), limit)}
    return _joined(_sequence(items[:-1], limit), endings, limit)


def _is_plain_group(item: Any) -> bool:
    kind, value = item
    return kind is _SRE.SUBPATTERN and not value[1] and not value[2]


def _sequence(items: Any, limit: int) -> set[str]:
    return reduce(lambda before, item: _joined(before, _strings(item, limit), limit), items, {""})


def _joined(first: set[str], second: set[str], limit: int) -> set[str]:
    if len(first) * len(second) > 4 * limit + 4:
        raise _Unlisted
    return _bounded({one + other for one, other in product(first, second)}, limit)


def _strings(item: Any, limit: int) -> set[str]:
    kind, value = item
    if kind is _SRE.LITERAL:
        return {chr(value)}
    if kind is _SRE.IN:
        return _bounded({char for part in value for char in _characters(part, limit)}, limit)
    if kind is _SRE.BRANCH:
        return _bounded({text for branch in value[1] for text in _sequence(branch, limit)}, limit)
    if _is_plain_group(item):
        return _sequence(value[3], limit)
    if kind is _SRE.MAX_REPEAT or kind is _SRE.MIN_REPEAT:
        least, most, repeated = value
        if most > limit:
            raise _Unlisted
        once, texts = _sequence(repeated, limit), {""}
        found = set(texts) if least == 0 else set()
        for count in range(1, most + 1):
            texts = _joined(texts, once, limit)
            if count >= least:
                found = _bounded(found | texts, limit)
        return found
    raise _Unlisted


def _characters(part: Any, limit: int) -> Iterator[str]:
    kind, value = part
    if kind is _SRE.LITERAL:
        yield chr(value)
    elif kind is _SRE.RANGE and value[1] - value[0] <= limit:
        yield from map(chr, range(value[0], value[1] + 1))
    elif kind is _SRE.CATEGORY and value in _CATEGORIES:
        yield from _CATEGORIES[value]
    else:
        raise _Unlisted


def _bounded(texts: set[str], limit: int) -> set[str]:
    if len(texts) > limit:
        raise _Unlisted
    return texts
