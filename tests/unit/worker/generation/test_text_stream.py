"""Pieces of a growing text: joined they are the finished text, and no piece is taken back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.generation.text_stream import TextStream

PIECES = [b"A", b" B", b"\xe2\x82", b"\xac", b"st", b"op", b"\xff", b""]


def decode(token_ids: Sequence[int]) -> str:
    return b"".join(PIECES[token] for token in token_ids).decode(errors="replace")


def stripping(token_ids: Sequence[int]) -> str:
    """As SentencePiece: a text's first space is not there."""
    return decode(token_ids).removeprefix(" ")


def test_half_a_character_is_held_back() -> None:
    stream = TextStream(decode, ())
    assert [stream.feed([0]), stream.feed([0, 2]), stream.feed([0, 2, 3])] == ["A", "", "€"]


def test_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    stream = TextStream(decode, ("stop",))
    assert [stream.feed([0]), stream.feed([0, 4]), stream.feed([0, 4, 0])] == ["A", "", "stA"]


def test_finished_text_ends_what_was_held_back() -> None:
    stream = TextStream(decode, ("stop",))
    given_out = stream.feed([0, 4]) + stream.feed([0, 4, 5])
    assert given_out + stream.finish("A") == "A"


@pytest.mark.parametrize("decoder", [decode, stripping])
@given(token_ids=st.lists(st.integers(0, len(PIECES) - 1), min_size=1), sizes=st.lists(st.integers(1, 4), min_size=1))
def test_pieces_joined_are_the_text(decoder: object, token_ids: list[int], sizes: list[int]) -> None:
    assert callable(decoder)
    stream = TextStream(decoder, ("stop", "AA"))
    said, end = "", 0
    while end < len(token_ids):
        end += sizes[end % len(sizes)]
        said += stream.feed(token_ids[:end])
        assert decoder(token_ids).startswith(said) or "\N{REPLACEMENT CHARACTER}" in decoder(token_ids)
    if "\N{REPLACEMENT CHARACTER}" not in decoder(token_ids):
        assert said + stream.finish(decoder(token_ids)) == decoder(token_ids)
