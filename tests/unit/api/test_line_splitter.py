"""Lines out of a stream, however it is cut into pieces."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.request_body import LineSplitter, NumberedLine
from jobs.errors import TooLarge

MARK = b"\xef\xbb\xbf"  # of the byte order


def split(pieces: list[bytes], *, max_line_bytes: int = 100, max_lines: int = 100) -> list[NumberedLine]:
    splitter = LineSplitter(max_line_bytes=max_line_bytes, max_lines=max_lines)
    lines = [line for piece in pieces for line in splitter.feed(piece)]
    return lines + list(splitter.close())


def whole(raw: bytes) -> list[NumberedLine]:
    """The same, with the whole body at hand."""
    lines = enumerate(raw.split(b"\n"), 1)
    return [
        NumberedLine(number, line.removeprefix(MARK).removesuffix(b"\r"))
        for number, line in lines
        if line.replace(MARK, b"").strip(b" \t\r")
    ]


pieces = st.lists(st.text("ab \r\n\t\u2028\ufeff", max_size=6).map(str.encode), max_size=8)


@given(pieces, st.booleans())
def test_splitter_gives_the_same_lines_however_the_stream_is_cut(pieces: list[bytes], is_marked: bool) -> None:
    pieces = [b"\xef\xbb", b"\xbf", *pieces] if is_marked else pieces
    assert split(pieces) == whole(b"".join(pieces))


def test_splitter_strips_line_endings() -> None:
    assert split([b"\xef\xbb\xbfa\r\n\r\n \t\nb\xe2\x80\xa8c\n\nd"]) == [
        NumberedLine(1, b"a"),
        NumberedLine(4, "b\u2028c".encode()),
        NumberedLine(6, b"d"),
    ]
    assert split([MARK + b"a\n" + MARK + b"b\n" + MARK + b"\n"]) == [NumberedLine(1, b"a"), NumberedLine(2, b"b")]
    assert split([]) == split([b""]) == split([b"\n\n"]) == []


@pytest.mark.parametrize(
    "pieces",
    [
        [b"a\n" + b" " * 11 + b"\n"],
        [b"a\n" + b"x" * 11 + b"\n"],
        [b"a\n" + b"x" * 11],
        [b"a\n", *[b"x"] * 11],
        [b"a\nx", b"x" * 10 + b"\nb"],
    ],
)
def test_splitter_refuses_a_line_as_soon_as_it_is_too_long(pieces: list[bytes]) -> None:
    splitter = LineSplitter(max_line_bytes=10, max_lines=100)
    with pytest.raises(TooLarge) as refused:
        [list(splitter.feed(piece)) for piece in pieces]
    assert refused.value.line == 2


def test_splitter_counts_blank_lines() -> None:
    assert len(split([b"a\n" * 5], max_lines=5)) == 5
    for raw in (b"a\n" * 6, b"a\n" * 5 + b"b", b"\n" * 6):
        with pytest.raises(TooLarge) as refused:
            split([raw], max_lines=5)
        assert refused.value.line == 6


def test_splitter_counts_a_million_blank_lines_at_once() -> None:
    """Line by line they took 3 s for each million, on the event loop."""
    splitter = LineSplitter(max_line_bytes=100, max_lines=10_000_000)
    blank, began = b"\n\r\n" * 100_000, time.process_time()
    for _ in range(20):
        assert list(splitter.feed(blank)) == []
    assert time.process_time() - began < 1
    assert list(splitter.feed(b"a\n")) == [NumberedLine(4_000_001, b"a")]
