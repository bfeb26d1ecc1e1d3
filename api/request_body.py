"""Request bodies as bounded streams: an upload that is too large, too slow or too deeply packed is cut on the way in.

socket ──read_body──▶ bytes, decompressed ──LineSplitter──▶ numbered lines

Memory stays flat: one piece of at most 64 KiB from the server, one slice of decompressed data, one unfinished line.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from starlette.requests import Request

from api.errors import BodyTimeout, UnsupportedMediaType
from jobs.errors import InvalidInput, TooLarge

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = 31  # zlib's `wbits` for a gzip header and the largest window
SLICE = 256 * 1024  # bytes decompressed at a time
_BLANK_LINES = re.compile(rb"(?:[ \t\r\n]|\xef\xbb\xbf)*+")


@dataclass(frozen=True, slots=True)
class NumberedLine:
    """A line of a file without its line ending. `number` is 1-based and counts blank lines too."""

    number: int
    raw: bytes


async def read_body(request: Request, *, max_bytes: int, timeout: float) -> AsyncIterator[bytes]:
    """The body in pieces, decompressed where it came as gzip.

    Raises `TooLarge` past `max_bytes` (as sent and as decompressed), `BodyTimeout` when nothing came for `timeout`
    seconds, `UnsupportedMediaType` for another Content-Encoding, `ClientDisconnect` when the caller hung up.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise UnsupportedMediaType(
            f"The Content-Encoding {encoding[:40]!r} is not understood; send plain bytes or gzip."
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise _too_large(max_bytes)
    received = _receive(request, max_bytes=max_bytes, timeout=timeout)
    pieces = received if encoding == "identity" else _gunzip(received, max_bytes=max_bytes)
    async for piece in pieces:
        yield piece


async def _receive(request: Request, *, max_bytes: int, timeout: float) -> AsyncIterator[bytes]:
    stream = request.stream()
    size = 0
    while True:
        try:
            async with asyncio.timeout(timeout):
                piece = await anext(stream, b"")
        except TimeoutError:
            raise BodyTimeout(timeout) from None
        if not piece:
            return
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        yield piece


async def _gunzip(pieces: AsyncIterator[bytes], *, max_bytes: int) -> AsyncIterator[bytes]:
    inflate = zlib.decompressobj(wbits=GZIP)
    size = 0
    is_started = False
    async for piece in pieces:
        waiting, is_full = piece, False
        while waiting or is_full:
            if inflate.eof:  # a gzip file may be several, one after the other
                inflate = zlib.decompressobj(wbits=GZIP)
            try:
                data = inflate.decompress(waiting, SLICE)
            except zlib.error:
                raise InvalidInput("The body is not valid gzip.") from None
            is_started = True
            waiting = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
            is_full = len(data) == SLICE and not inflate.eof
            size += len(data)
            if size > max_bytes:
                raise _too_large(max_bytes)
            if data:
                yield data
            # A small piece can hold a thousand slices: let others have their turn between two of them.
            await asyncio.sleep(0)
    if is_started and not inflate.eof:
        raise InvalidInput("The gzip body ends too early.")


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"The body is larger than {max_bytes} bytes.")


async def read_whole(request: Request, *, max_bytes: int, timeout: float) -> bytes:
    """The whole of a small body."""
    body = bytearray()
    async for piece in read_body(request, max_bytes=max_bytes, timeout=timeout):
        body += piece
    return bytes(body)


class LineSplitter:
    """Cuts a stream at b"\\n", and nowhere else: U+2028 and its like are characters of a string.

    A byte order mark at the start of a line is dropped (joined files have several), and so is the "\\r" before a "\\n".
    Blank lines are counted but not returned. The last line needs no line ending.
    """

    def __init__(self, *, max_line_bytes: int, max_lines: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._max_lines = max_lines
        self._number = 0
        self._unfinished = bytearray()

    def feed(self, data: bytes) -> Iterator[NumberedLine]:
        """The lines that `data` completes. Raises `TooLarge` at the line that is too long, or one too many."""
        end = data.find(b"\n")
        if end < 0:
            self._unfinished += data
            self._check_length(len(self._unfinished))
            return
        yield from self._finish(bytes(self._unfinished) + data[:end])
        self._unfinished.clear()
        last = data.rfind(b"\n") + 1
        at = end + 1
        # Runs of blank lines are counted at once: a few bytes of gzip can hold millions of them.
        while (text := _BLANK_LINES.match(data, at, last)) is not None and (begin := text.end()) < last:
            begin = data.rfind(b"\n", 0, begin) + 1
            self._skip(data[at:begin])
            end = data.index(b"\n", begin)
            yield from self._finish(data[begin:end])
            at = end + 1
        self._skip(data[at:last])
        self._unfinished += data[last:]
        self._check_length(len(self._unfinished))

    def close(self) -> Iterator[NumberedLine]:
        """The last line, where the stream ended without a line ending."""
        if self._unfinished:
            yield from self._finish(bytes(self._unfinished))
            self._unfinished.clear()

    def _skip(self, blank_lines: bytes) -> None:
        if len(blank_lines) > self._max_line_bytes:
            for blank in blank_lines.split(b"\n")[:-1]:
                self._check_length(len(blank))
        self._count(blank_lines.count(b"\n"))

    def _finish(self, raw: bytes) -> Iterator[NumberedLine]:
        self._check_length(len(raw))
        self._count(1)
        if not _BLANK_LINES.fullmatch(raw):
            yield NumberedLine(self._number, raw.removeprefix(BYTE_ORDER_MARK).removesuffix(b"\r"))

    def _count(self, lines: int) -> None:
        self._number += lines
        if self._number > self._max_lines:
            raise TooLarge(f"More than {self._max_lines} lines in one job.", line=self._max_lines + 1)

    def _check_length(self, length: int) -> None:
        if length > self._max_line_bytes:
            raise TooLarge(f"The line is longer than {self._max_line_bytes} bytes.", line=self._number + 1)
