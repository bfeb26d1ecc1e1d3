"""Lines of a stream in groups, each small enough for one transaction."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

from api.request_body import LineSplitter, NumberedLine
from jobs.errors import TooLarge

GROUP_BYTES = 4 * 1024 * 1024  # of raw lines: a group of long lines is cut short, so that memory stays flat
GROUP_SECONDS = 1.0  # a slow upload is checked and stored at least this often


async def groups_of_lines(
    pieces: AsyncIterator[bytes], note: Callable[[bytes], None], splitter: LineSplitter, limit: int
) -> AsyncIterator[list[NumberedLine]]:
    """Lines in groups of at most `limit`. `note` sees every piece of the body."""
    group: list[NumberedLine] = []
    size = 0
    began = time.monotonic()
    try:
        async for piece in pieces:
            note(piece)
            for line in splitter.feed(piece):
                group.append(line)
                size += len(line.raw)
                if len(group) >= limit or size >= GROUP_BYTES or time.monotonic() - began >= GROUP_SECONDS:
                    yield group
                    group, size, began = [], 0, time.monotonic()
        group.extend(splitter.close())
    except TooLarge:
        # What came before it may be wrong too, and then that is what the caller hears of.
        if group:
            yield group
        raise
    if group:
        yield group
