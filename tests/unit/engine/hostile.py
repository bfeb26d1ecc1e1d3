"""Hostile schemas, regular expressions and grammars, and innocent ones that are as costly.

Each is refused, or harmless; what matters is that no other request notices.
"""

from __future__ import annotations

from typing import Any

from engine import StructuredOutputs


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _chain(length: int, link: Any, last: dict[str, Any]) -> dict[str, Any]:
    """Definitions d0 .. d`length`, each made of two references to the next."""
    definitions = {f"d{n}": link({"$ref": f"#/$defs/d{n + 1}"}) for n in range(length)}
    return {"$defs": {**definitions, f"d{length}": last}, "$ref": "#/$defs/d0"}


_SCHEMAS: dict[str, dict[str, Any]] = {
    "ref to itself": {"$ref": "#"},
    "refs in a ring": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "doubling anyOf": _chain(40, lambda ref: {"anyOf": [ref, ref]}, {"enum": ["x"]}),
    "doubling allOf": _chain(40, lambda ref: {"allOf": [ref, ref]}, {"enum": ["x"]}),
    "product of anyOfs": {
        "allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {"type": "null"}}} for j in range(3)]} for i in range(20)]
    },
    "remote ref": {"$ref": "http://169.254.169.254/latest/meta-data"},
    "file ref": {"$ref": "file:///etc/passwd"},
    "a billion characters": {"type": "string", "minLength": 10**9},
    "wide integers": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "huge maxLength": {"type": "string", "maxLength": 10**30},
    "tiny multipleOf": {"type": "number", "multipleOf": 1e-300},
    "big multipleOf": {"type": "integer", "multipleOf": 999_999_937},
    "many remainders": {"type": "integer", "multipleOf": 99_991, "minimum": 0, "maximum": 10**15},
    "nested repetition": {"type": "string", "pattern": "(a{1,1000}){1,1000}b{999999999}"},
    "look-ahead": {"type": "string", "pattern": r"^(?=.*[A-Z])(?=.*\d).{8,}$"},
    "back-reference": {"type": "string", "pattern": r"^(a)\1$"},
    "unclosed": {"type": "string", "pattern": "(((["},
    "pattern and length": {"type": "string", "pattern": "^(a|b)*a(a|b){200}$", "minLength": 1000, "maxLength": 2000},
    "overlapping patterns": {
        "type": "object",
        "patternProperties": {f"^a{n}.*b.*c.*d$": {"type": "integer"} for n in range(60)},
    },
    "impossible length": {"type": "string", "minLength": 5, "maxLength": 2},
    "two types at once": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "not": {"not": {}},
    "if and then": {"type": "object", "if": {}, "then": {}},
    "no type": {"type": 17},
    "type of types": {"type": ["string", ["integer"]]},
    "required is a number": {"type": "object", "required": 3},
    "minimum is a word": {"type": "integer", "minimum": "low"},
    "enum of nothing": {"enum": []},
    "unique items": {"type": "array", "uniqueItems": True, "items": {"enum": list(range(50))}, "minItems": 50},
    "dynamic ref": {"$id": "http://x/", "$dynamicRef": "#a"},
    "missing definition": {"$ref": "#/$defs/nowhere"},
    "unknown format": {"type": "string", "format": "iban"},
    "deeper than JSON goes": _nested(150),
    "endless tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"left": {"$ref": "#/$defs/node"}, "right": {"$ref": "#/$defs/node"}},
                "required": ["left", "right"],
            }
        },
        "$ref": "#/$defs/node",
    },
    "cube of arrays": {
        "type": "array",
        "minItems": 10**6,
        "items": {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}},
    },
}

_REGEXES = {
    "nested counts": "(a{1,1000}){1,1000}",
    "nested counts, thrice": "((a{0,100}){0,100}){0,100}b{0,50000}",
    "counted to a billion": "a{999999999}b",
    "exponential states": "(.*)a.{2000}b",
    "optional in front of required": "(a?){5000}a{5000}",
    "brackets": "(" * 1000 + "a" + ")" * 1000,
    "stars": "a" + "*" * 10_000,
    "look-ahead": "(?=a)b",
    "nothing matches": r"[^\s\S]",
    "not UTF-8": r"(?-u:\xff)+",
}

_GRAMMARS = {
    "rules in a ring": "start: a\na: b\nb: a",
    "doubling rules": "\n".join(["start: r0", *(f"r{n}: r{n + 1} r{n + 1}" for n in range(40)), 'r40: "a"']),
    "doubling terminals": "\n".join(["start: T0", *(f"T{n}: T{n + 1} T{n + 1}" for n in range(40)), 'T40: "a"']),
    "rows without end": 'start: x{1,1000000}\nx: y{1,1000000}\ny: "a"',
    "brackets": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "products of automata": "start: T\nT: /(.*)a.{20}/ & /(.*)b.{25}/ & /(.*)c.{30}/ & ~/.*d.{11}.*/",
    "no grammar": "start: $$$",
}

HOSTILE: dict[str, StructuredOutputs] = {
    **{f"schema: {name}": StructuredOutputs(json=schema) for name, schema in _SCHEMAS.items()},
    **{f"regex: {name}": StructuredOutputs(regex=regex) for name, regex in _REGEXES.items()},
    **{f"grammar: {name}": StructuredOutputs(grammar=grammar) for name, grammar in _GRAMMARS.items()},
}
