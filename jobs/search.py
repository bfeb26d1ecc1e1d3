"""The language in which jobs are searched: `status:open model:a,b -name:test lines:>10k created:<2d`.

query = { ["-"] ( field ":" value { "," value } | word ) }
value = [ ">" | "<" | ">=" | "<=" ] ( word | '"' text '"' )

Terms are joined by AND, values by OR. A word by itself is the beginning of a name or an id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from jobs.errors import InvalidInput

MAX_TERMS = 32
MAX_VALUES = 32
FIELDS = frozenset(
    {
        "status", "model", "tenant", "id", "name", "priority", "created", "ended", "lines", "failed", "tokens",
        "deadline", "code",
    }
)  # fmt: skip
METADATA = "metadata."

_TERM = re.compile(r'(?P<minus>-?)(?:(?P<field>[A-Za-z_][\w.-]*):)?(?P<value>(?:"[^"]*"|[^\s"])+)')
_VALUE = re.compile(r'(?P<comparison>[<>]=?)?(?:"(?P<text>[^"]*)"|(?P<word>[^,"]+))(?:,|$)')
_NUMBER = re.compile(r"(-?\d{1,12}(?:\.\d{1,6})?)([kKmMgG]?)")
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)([smhdw])")
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


@dataclass(frozen=True, slots=True)
class Value:
    """`comparison` is empty, or one of > < >= <=."""

    text: str
    comparison: str = ""

    def number(self, field: str) -> float:
        """`10k` as 10,000. Raises `InvalidInput`."""
        found = _NUMBER.fullmatch(self.text)
        if found is None:
            raise InvalidInput(f"{field}: a number is expected, as 100, >10k or <=2M", param="q")
        return float(found[1]) * _MULTIPLES[found[2].lower()]

    def seconds(self, field: str) -> float:
        """`2h` in seconds. Raises `InvalidInput`."""
        found = _DURATION.fullmatch(self.text)
        if found is None or not self.comparison:
            raise InvalidInput(f"{field}: a time is expected, as <30m, >2h or <7d", param="q")
        return float(found[1]) * _SECONDS[found[2]]


@dataclass(frozen=True, slots=True)
class Term:
    """`field` is None for a word by itself."""

    field: str | None
    values: tuple[Value, ...]
    is_negated: bool = False


def parse(query: str) -> list[Term]:
    """The terms of a query. Raises `InvalidInput` that says which one is wrong, and what was probably meant."""
    terms = []
    place = 0
    while place < len(query):
        if query[place].isspace():
            place += 1
            continue
        found = _TERM.match(query, place)
        if found is None:
            raise InvalidInput(f"not understood from {query[place : place + 40]!r} on", param="q")
        place = found.end()
        terms.append(_term(found["field"], found["value"], is_negated=bool(found["minus"])))
    if len(terms) > MAX_TERMS:
        raise InvalidInput(f"at most {MAX_TERMS} terms", param="q")
    return terms


def _term(field: str | None, raw: str, *, is_negated: bool) -> Term:
    if field is None and raw.endswith(":"):
        raise InvalidInput(f"{raw[:40]} a value is expected; '' is not understood", param="q")
    if field is None:
        return Term(None, (Value(raw.replace('"', "")),), is_negated)
    if field not in FIELDS and not (field.startswith(METADATA) and len(field) > len(METADATA)):
        near = get_close_matches(field.lower(), FIELDS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(FIELDS))}, metadata.KEY"
        raise InvalidInput(f"there is no field {field[:40]!r}{hint}", param="q")
    values: list[Value] = []
    place = 0
    while place < len(raw):
        found = _VALUE.match(raw, place)
        if found is None or len(values) == MAX_VALUES:
            raise InvalidInput(f"{field}: the value {raw[:40]!r} is not understood", param="q")
        text = found["text"] if found["text"] is not None else found["word"]
        values.append(Value(text, found["comparison"] or ""))
        place = found.end()
    return Term(field, tuple(values), is_negated)
