"""The language in which jobs are searched."""

from __future__ import annotations

import pytest

from jobs.errors import InvalidInput
from jobs.search import MAX_TERMS, Term, Value, parse


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("", []),
        ("  \t ", []),
        ("nightly", [Term(None, (Value("nightly"),))]),
        ("-nightly", [Term(None, (Value("nightly"),), is_negated=True)]),
        ('"two words"', [Term(None, (Value("two words"),))]),
        ("status:open,paused", [Term("status", (Value("open"), Value("paused")))]),
        ("-model:org/name", [Term("model", (Value("org/name"),), is_negated=True)]),
        ('name:"a, b",c', [Term("name", (Value("a, b"), Value("c")))]),
        ("lines:>=10k failed:>0", [Term("lines", (Value("10k", ">="),)), Term("failed", (Value("0", ">"),))]),
        ("metadata.team:search", [Term("metadata.team", (Value("search"),))]),
    ],
)
def test_query_is_read_as_terms(query: str, terms: list[Term]) -> None:
    assert parse(query) == terms


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("stauts:open", "did you mean status?"),
        ("modell:x", "did you mean model?"),
        ("qqqqqq:x", "known are code, created"),
        ("metadata.:x", "there is no field"),
        ("status:,", "not understood"),
        ('name:"open', "not understood"),
        ("status:", "not understood"),
        (" ".join(["x"] * (MAX_TERMS + 1)), "at most 32 terms"),
        ("id:" + ",".join(["a"] * 33), "not understood"),
    ],
)
def test_search_error_says_what_is_wrong(query: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=r"^q: ") as refused:
        parse(query)
    assert said in str(refused.value)


@pytest.mark.parametrize(("text", "number"), [("7", 7), ("10k", 10_000), ("2M", 2_000_000), ("1.5k", 1500), ("-3", -3)])
def test_numbers_have_multiples(text: str, number: float) -> None:
    assert Value(text).number("lines") == number


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("2h", 7200), ("7d", 604_800), ("1.5h", 5400)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert Value(text, "<").seconds("created") == seconds


def test_values_of_another_kind_are_refused() -> None:
    for wrong in ("x", "10x", "1e9", "", "9" * 20):
        with pytest.raises(InvalidInput):
            Value(wrong).number("lines")
    for value in (Value("2h"), Value("2", ">"), Value("h", ">")):
        with pytest.raises(InvalidInput):
            value.seconds("created")
