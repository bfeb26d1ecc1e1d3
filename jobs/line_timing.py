"""Where a line's time went between its claim and its result, and how a result's row keeps it: 8 to 20 bytes.

version │ engine │ grammar │ prefill │ decode │ preempted │ write │ preemptions      milliseconds, as LEB128
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

VERSION = 1


@dataclass(frozen=True, slots=True)
class LineTiming:
    """A line that has ended and is not written yet. Seconds of each phase; they follow each other.

    engine      tokenized, and queued in the engine            decode     until its last token
    grammar     its grammar was compiled                       preempted  out of the batch, to be computed again
    prefill     its prompt was read, until the first token     ended      when that was, by `time.monotonic`
    """

    engine: float
    grammar: float
    prefill: float
    decode: float
    preempted: float
    preemptions: int
    ended: float

    def stored(self, now: float) -> bytes:
        """As a row keeps it that is written `now`."""
        stored = bytearray((VERSION,))
        for seconds in (self.engine, self.grammar, self.prefill, self.decode, self.preempted, now - self.ended):
            _append(stored, int(1000 * seconds + 0.5) if seconds > 0 else 0)
        _append(stored, self.preemptions)
        return bytes(stored)


@dataclass(frozen=True, slots=True)
class StoredTiming:
    """What a row says. Milliseconds of each phase; `write`: until its result was on the way to Postgres."""

    engine: int
    grammar: int
    prefill: int
    decode: int
    preempted: int
    write: int
    preemptions: int

    @classmethod
    def read(cls, stored: bytes | None) -> StoredTiming | None:
        """None where the line was not timed, or by a version that is not known."""
        if not stored or stored[0] != VERSION:
            return None
        return cls(*_numbers(stored[1:]))


def _append(stored: bytearray, number: int) -> None:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    while number > 0x7F:
        stored.append(number & 0x7F | 0x80)
        number >>= 7
    stored.append(number)


def _numbers(stored: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in stored:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
