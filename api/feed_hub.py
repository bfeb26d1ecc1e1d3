"""The feed's fan-out: one look a second at the database, for all streams of the process together.

A message says how a thing is now, never a difference. So a stream needs no queue: it knows the number of the last tick
that it sent, and sends what changed since, however long its client took to read.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from uuid import UUID

from api.feed_items import PARTS, Found, Key, Scope, Search, Wanted, event

logger = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds between two looks
LEAST_PAUSE = 0.2  # seconds, where a new stream waits for its first look
CALM = 5.0  # seconds that figures which only follow the clock stay as they are
COMMENT_AFTER = 3.0  # seconds of silence
CHECK_TICKS = 15  # between two looks at whether a stream's key still holds
KEPT_TICKS = 120  # that a message outlives its last look, for a stream that comes back
MOST_STREAMS = 1000  # of a process
MOST_OF_ONE = 4  # streams of one session

# Ticks between two looks at a thing, and how many of the kind one tick looks at; the others' turn comes with the next.
PACE = {
    "overview": (1, 8),
    "queue": (5, 8),
    "workers": (5, 1),
    "search": (1, 16),
    "job": (1, 2000),
    "parts": (2, 32),
}

Look = Callable[[Wanted], Awaitable[Mapping[Key, Found]]]


@dataclass(frozen=True, slots=True)
class Interest:
    """What a stream shows."""

    scope: Scope
    topics: frozenset[str] = frozenset()
    jobs: frozenset[UUID] = frozenset()
    opened: UUID | None = None
    """Of the jobs, the one whose page it is."""

    search: Search | None = None

    def looks(self) -> Iterator[Key]:
        """What is to be looked at, each under a kind of `PACE`."""
        for topic in ("overview", "queue"):
            if topic in self.topics:
                yield topic, self.scope
        if "workers" in self.topics:
            yield ("workers",)
        if self.search is not None:
            yield "search", self.search
        for job_id in self.jobs:
            yield "job", self.scope, job_id
        if self.opened is not None:
            yield "parts", self.scope, self.opened

    def messages(self) -> Iterator[Key]:
        """The keys of what is to be sent."""
        for key in self.looks():
            if key[0] != "parts":
                yield key
        if self.opened is not None:
            for part in PARTS:
                yield "part", self.scope, self.opened, part


@dataclass(eq=False, slots=True)
class _Stream:
    shown: Interest
    """Without the search, in which streams of one page differ: each knows another job as the newest."""

    search: Search | None
    session: Hashable | None
    is_gone: Callable[[], bool]


@dataclass(slots=True)
class _Message:
    found: Found
    tick: int  # since which it is this
    at: float  # when that was
    looked: int  # the tick of the newest look


class Feed:
    """The streams of one process. Make it, use it and close it inside one event loop."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._process = secrets.token_hex(4)
        self._tick = 0
        self._streams: set[_Stream] = set()
        self._messages: dict[Key, _Message] = {}
        self._joined: dict[tuple[Interest, int], bytes] = {}  # of this tick: what changed since another one
        self._looked: dict[Key, int] = {}
        self._ticked = asyncio.Event()
        self._has_newcomer = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._is_closed = False

    def has_room(self, session: Hashable | None) -> bool:
        """Whether one more stream is taken. Without a session only the process's bound counts."""
        open_now = [stream for stream in self._streams if not stream.is_gone()]
        if self._is_closed or len(open_now) >= MOST_STREAMS:
            return False
        return session is None or sum(stream.session == session for stream in open_now) < MOST_OF_ONE

    async def read(
        self,
        interest: Interest,
        *,
        last: str | None,
        session: Hashable | None,
        version: str,
        holds: Callable[[], Awaitable[bool]],
        is_gone: Callable[[], bool] = lambda: False,
    ) -> AsyncGenerator[bytes]:
        """Chunks of whole events, until the server stops, the reader `is_gone` or its key no longer `holds`.

        After the id `last` of this process come the changes since; after any other, and without one, how all is now.
        """
        loop = asyncio.get_running_loop()
        began = self._tick
        sent = self._tick_of(last)
        stream = _Stream(self._shared_interest(replace(interest, search=None)), interest.search, session, is_gone)
        own = [] if interest.search is None else [("search", interest.search)]
        yield b"retry: 3000\n" + event("hello", {"version": version}) + b"\n"
        if last is not None and sent < 0:
            yield event("reset", {}) + b"\n"
        with self._listening(stream):
            spoke = loop.time()
            while not self._is_closed:
                await self._ticked.wait()
                if is_gone():
                    return
                if self._tick % CHECK_TICKS == 0 and not await holds():
                    return
                changed = [
                    *self._shared(stream.shown, since=sent, looked_after=began),
                    *self._changed(own, since=sent, looked_after=began),
                ]
                sent = self._tick
                if changed or loop.time() - spoke >= COMMENT_AFTER:
                    spoke = loop.time()
                    # The id comes last: a stream that is cut before it gets all of the tick once more.
                    messages = changed or [event("beat", {})]  # an event, since a script sees no comment
                    yield b"\n".join(messages) + b"id: %s-%d\n\n" % (self._process.encode(), sent)
            yield event("bye", {}) + b"\n"

    def close(self) -> None:
        """End every stream: the server stops."""
        self._is_closed = True
        self._wake()

    def _shared_interest(self, shown: Interest) -> Interest:
        """The object of another stream that shows the same: two that are one compare without a look at their jobs."""
        return next((stream.shown for stream in self._streams if stream.shown == shown), shown)

    def _tick_of(self, event_id: str | None) -> int:
        """The tick that an id names; -1 where it is none of this process's."""
        process, _, tick = (event_id or "").partition("-")
        is_ours = process == self._process and tick.isdecimal() and int(tick) <= self._tick
        return int(tick) if is_ours else -1

    def _shared(self, shown: Interest, *, since: int, looked_after: int) -> list[bytes]:
        """What changed, joined once for all streams that show the same and are as far."""
        if since < looked_after:
            return self._changed(shown.messages(), since=since, looked_after=looked_after)
        joined = self._joined.get((shown, since))
        if joined is None:
            messages = self._changed(shown.messages(), since=since, looked_after=looked_after)
            joined = self._joined[shown, since] = b"\n".join(messages)
        return [joined] if joined else []

    def _changed(self, keys: Iterable[Key], *, since: int, looked_after: int) -> list[bytes]:
        found = (self._messages.get(key) for key in keys)
        return [
            message.found.message
            for message in found
            if message is not None and message.tick > since and message.looked > looked_after
        ]

    @contextmanager
    def _listening(self, stream: _Stream) -> Iterator[None]:
        self._streams.add(stream)
        self._has_newcomer.set()
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run())
        try:
            yield
        finally:
            self._streams.discard(stream)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._streams and not self._is_closed:
            began = loop.time()
            self._has_newcomer.clear()
            due = self._due()
            try:
                found = await self._look(_wanted(due))
            except Exception as error:  # noqa: BLE001  the streams fall silent, which tells their pages
                logger.warning("Cannot look for what changed: %s", type(error).__name__)
            else:
                self._take(due, found, loop.time())
                self._wake()
            # A slow database is left alone for as long as it took.
            await asyncio.sleep(max(LEAST_PAUSE, loop.time() - began))
            try:
                async with asyncio.timeout_at(began + INTERVAL):
                    await self._has_newcomer.wait()
            except TimeoutError:
                continue

    def _due(self) -> dict[str, list[Key]]:
        """By kind, what the next look reads: what some stream shows, those first whose last look is longest ago."""
        due: dict[str, list[Key]] = {kind: [] for kind in PACE}
        shown = {key for interest in {stream.shown for stream in self._streams} for key in interest.looks()}
        searches = {("search", stream.search) for stream in self._streams if stream.search is not None}
        for key in shown | searches:
            kind = str(key[0])
            if self._tick + 1 - self._looked.get(key, -KEPT_TICKS) >= PACE[kind][0]:
                due[kind].append(key)
        for kind, keys in due.items():
            most = PACE[kind][1]
            if len(keys) > most:
                keys.sort(key=lambda key: self._looked.get(key, -KEPT_TICKS))
                del keys[most:]
        return due

    def _take(self, due: Mapping[str, Sequence[Key]], found: Mapping[Key, Found], now: float) -> None:
        self._tick += 1
        self._joined.clear()
        for keys in due.values():
            self._looked.update(dict.fromkeys(keys, self._tick))
        for key, thing in found.items():
            before = self._messages.get(key)
            if before is None:
                self._messages[key] = _Message(thing, self._tick, now, self._tick)
                continue
            before.looked = self._tick
            is_calm = before.found.core == thing.core and now - before.at < CALM
            if before.found.message != thing.message and not is_calm:
                before.found, before.tick, before.at = thing, self._tick, now
        if self._tick % KEPT_TICKS == 0:
            oldest = self._tick - KEPT_TICKS
            self._messages = {key: kept for key, kept in self._messages.items() if kept.looked > oldest}
            self._looked = {key: tick for key, tick in self._looked.items() if tick > oldest}

    def _wake(self) -> None:
        ticked, self._ticked = self._ticked, asyncio.Event()
        ticked.set()


def _wanted(due: Mapping[str, Sequence[Key]]) -> Wanted:
    """Keys as what a look takes: the first part of each is its kind."""
    return Wanted(
        jobs=[key[1:] for key in due["job"]],  # type: ignore[misc]
        opened=[key[1:] for key in due["parts"]],  # type: ignore[misc]
        overviews=[key[1] for key in due["overview"]],  # type: ignore[misc]
        queues=[key[1] for key in due["queue"]],  # type: ignore[misc]
        searches=[key[1] for key in due["search"]],  # type: ignore[misc]
        has_workers=bool(due["workers"]),
    )
