"""Messages that differ in what differs from line to line have one template; others have not."""

from __future__ import annotations

import pytest

from jobs.fingerprints import OTHER, TEMPLATE_LENGTH, Failure, parse, public, template_of


@pytest.mark.parametrize(
    ("message", "template"),
    [
        ("The prompt has 9,314 tokens, 4096 are allowed", "The prompt has # tokens, # are allowed"),
        ("no function 'weather' in \"tools\"", "no function “…” in “…”"),
        ("it isn't there, and can't be", "it isn't there, and can't be"),
        ("see https://example.com/a/b?x=1 for more", "see example.com for more"),
        ("request 6f9619ff-8b86-d011-b42d-00cf4fc964ff died", "request … died"),
        ("req_019f3c2a9d8b7c6e5f4a3b2c1d0e9f8a-17-2 died", "… died"),
        ("job_019f3c2a9d8b7c6e5f4a3b2c1d0e9f8a died", "… died"),
        ("digest deadbeef01 differs", "digest … differs"),
        ("cannot open /var/lib/models/a.json: gone", "cannot open a.json: gone"),
        ("one  two\tthree\nTraceback", "one two three"),
        ("  ", ""),
        ("caf\u0065\u0301 9", "café #"),
        ("a\0b", "ab"),
    ],
)
def test_template_keeps_what_lines_have_in_common(message: str, template: str) -> None:
    assert template_of(message) == template


def test_template_is_bounded_when_the_message_is_not() -> None:
    assert len(template_of("word " * 1_000_000)) == TEMPLATE_LENGTH


def test_fingerprint_differs_by_code_and_by_template() -> None:
    alike = {Failure.of("too_long", f"{count} tokens").fingerprint for count in (1, 22, 333)}
    others = {Failure.of("too_short", "1 tokens").fingerprint, Failure.of("too_long", "1 bytes").fingerprint}
    assert len(alike) == 1
    assert len(alike | others) == 3
    assert OTHER not in alike | others


def test_fingerprint_stays_what_it_was() -> None:
    # It stands in the database and in links: a change of the rules needs another version.
    assert public(Failure.of("context_length_exceeded", "The prompt has 9 tokens").fingerprint) == "v1:d26dc248a473e163"


@pytest.mark.parametrize("fingerprint", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_public_fingerprint_is_read_back(fingerprint: int) -> None:
    assert parse(public(fingerprint)) == fingerprint


@pytest.mark.parametrize("text", ["", "v1:", "v2:0000000000000001", "v1:1", "v1:000000000000000G", "0000000000000001"])
def test_parse_refuses_what_is_no_fingerprint(text: str) -> None:
    assert parse(text) is None
