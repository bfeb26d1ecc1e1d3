"""Stop strings, over a tokenizer of single bytes, of pieces, and one that strips a text's first space."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokenization.stop_strings import Decode, StopScanner, may_touch


def of_bytes(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode("utf-8", errors="replace")


PIECES = ["", "a", "b", "ab", "ba", " a", " ", "STOP", "ST", "OP", "é", "🙂", "x🙂"]


def of_pieces(token_ids: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in token_ids)


def of_stripped_pieces(token_ids: Sequence[int]) -> str:
    return of_pieces(token_ids).removeprefix(" ")


def run(
    decode: Decode, token_ids: Sequence[int], stop: Sequence[str], *, min_tokens: int = 0, include_stop: bool = False
) -> tuple[int, tuple[str, str] | None]:
    """Feed until the scanner stops; returns the tokens used and what `cut` says."""
    scanner = StopScanner(decode, stop, min_tokens=min_tokens, include_stop=include_stop)
    for used in range(1, len(token_ids) + 1):
        if scanner.feed(token_ids[used - 1]):
            cut = scanner.cut(token_ids[:used], decode(token_ids[:used]))
            if cut is not None:
                return used, cut
    return len(token_ids), scanner.cut(token_ids, decode(token_ids))


def test_scanner_finds_a_stop_string_across_tokens() -> None:
    tokens = [PIECES.index(piece) for piece in ("a", "ST", "OP", "b")]
    assert run(of_pieces, tokens, ["STOP"]) == (3, ("a", "STOP"))


def test_scanner_finds_a_stop_string_inside_a_token() -> None:
    tokens = [PIECES.index(piece) for piece in ("a", "STOP", "b")]
    assert run(of_pieces, tokens, ["TO"]) == (2, ("aS", "TO"))


def test_cut_keeps_the_stop_string_when_included() -> None:
    tokens = [PIECES.index(piece) for piece in ("a", "STOP", "b")]
    assert run(of_pieces, tokens, ["TO"], include_stop=True) == (2, ("aSTO", "TO"))


def test_cut_is_at_the_first_stop_string_of_the_text() -> None:
    tokens = [PIECES.index(piece) for piece in ("a", "STOP")]
    assert run(of_pieces, tokens, ["OP", "ST"]) == (2, ("a", "ST"))


def test_scanner_finds_a_character_spread_over_tokens() -> None:
    tokens = list("x🙂y".encode())
    assert run(of_bytes, tokens, ["🙂"]) == (5, ("x", "🙂"))


def test_scanner_finds_a_stop_string_after_broken_utf8() -> None:
    tokens = [0xFF, 0xC3, 0xFF, 0xF0, 0x9F, *b"ab"]
    assert run(of_bytes, tokens, ["ab"])[0] == len(tokens)
    assert run(of_bytes, [0xF0] * 40 + [*b"ab"], ["ab"])[0] == 42


def test_scanner_finds_a_replacement_character() -> None:
    used, cut = run(of_bytes, [*b"a", 0xFF, *b"b"], ["\N{REPLACEMENT CHARACTER}"])
    assert used <= 3
    assert cut == ("a", "\N{REPLACEMENT CHARACTER}")


def test_scanner_ignores_tokens_without_text() -> None:
    tokens = [PIECES.index(piece) for piece in ("a", "", "", " a", "")]
    assert run(of_stripped_pieces, tokens, [" "]) == (4, ("a", " "))


def test_scanner_ignores_stop_strings_before_min_tokens() -> None:
    tokens = [PIECES.index(piece) for piece in ("STOP", "a", "STOP", "b")]
    assert run(of_pieces, tokens, ["STOP"], min_tokens=2) == (3, ("STOPa", "STOP"))
    assert run(of_pieces, tokens, ["STOP"], min_tokens=1) == (1, ("", "STOP"))
    assert run(of_pieces, tokens, ["PaS"], min_tokens=3) == (3, ("STO", "PaS"))


SPECIAL = PIECES.index("STOP")


def without_special(token_ids: Sequence[int]) -> str:
    return of_pieces([token for token in token_ids if token != SPECIAL])


@pytest.mark.parametrize(
    ("stop", "used", "expected"),
    [
        ("STOP", 3, ("ab", "STOP")),  # the special token itself
        ("TO", 3, ("ab", "TO")),  # inside of it
        ("bSTOP", 3, ("a", "bSTOP")),  # across its beginning
        ("OPa", 4, ("ab", "OPa")),  # across its end
        ("ba", 4, ("a", "ba")),  # in the text without it
        (" a", 5, ("aba", " a")),
    ],
)
def test_stop_string_touches_a_special_token_that_the_text_leaves_out(
    stop: str, used: int, expected: tuple[str, str]
) -> None:
    tokens = [PIECES.index(piece) for piece in ("a", "b", "STOP", "a", " a", "b")]
    scanner = StopScanner(without_special, [stop], min_tokens=0, include_stop=False, decode_all=of_pieces)
    fed = next(n for n, token in enumerate(tokens, 1) if scanner.feed(token))
    assert fed == used
    assert scanner.cut(tokens[:used], without_special(tokens[:used])) == expected


@pytest.mark.parametrize(
    ("stop", "touches"), [("<end>", True), ("nd", True), ("x<e", True), ("d>\n", True), ("\n", False), ("end<x", False)]
)
def test_may_touch_finds_overlaps_with_special_tokens(stop: str, touches: bool) -> None:
    assert may_touch(["@@", stop], ["<end>"]) is touches


@pytest.mark.parametrize("decode", [of_bytes, of_pieces, of_stripped_pieces])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_scanner_stops_at_the_first_token_that_completes_a_stop_string(decode: Decode, data: st.DataObject) -> None:
    """As if the whole text were searched after each token, except that open UTF-8 may come a few tokens later."""
    alphabet = st.sampled_from([0xC3, 0xA9, 0xFF, *b"ab "]) if decode is of_bytes else st.integers(0, len(PIECES) - 1)
    tokens = data.draw(st.lists(alphabet, max_size=30))
    stop = data.draw(st.lists(st.text("ab é🙂SOPT", min_size=1, max_size=4), min_size=1, max_size=3))
    min_tokens = data.draw(st.integers(0, 4))

    first = next(
        (n for n in range(1, len(tokens) + 1) if n >= min_tokens and ends_in(decode, tokens, n, stop, min_tokens)), None
    )
    used, cut = run(decode, tokens, stop, min_tokens=min_tokens)
    if first is None:
        assert cut is None
        assert used == len(tokens)
    else:
        assert used == first
        assert cut is not None
        text, found = cut
        assert (text + found) in decode(tokens[:used])
        assert decode(tokens[:used]).startswith(text)
        assert found in stop


def ends_in(decode: Decode, tokens: Sequence[int], n: int, stop: Sequence[str], min_tokens: int) -> bool:
    text = decode(tokens[:n])
    ignored = len(decode(tokens[: min_tokens - 1])) if min_tokens > 1 else 0
    return any(text.find(s, max(0, ignored - len(s) + 1)) >= 0 for s in stop)
