"""What the feed looks at, and what it takes for a change, without a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from uuid import uuid4

import pytest

from api import feed_hub
from api.feed_hub import Feed, Interest
from api.feed_items import Found, Key, Search, Wanted

TENANTS = [uuid4() for _ in range(20)]


class Looks:
    """Answers each look with one message for each overview; `value` is in all of them."""

    def __init__(self) -> None:
        self.wanted: list[Wanted] = []
        self.value = 0
        self.core = 0
        self.failures = 0  # looks that are still to fail

    async def __call__(self, wanted: Wanted) -> Mapping[Key, Found]:
        if self.failures:
            self.failures -= 1
            raise OSError
        self.wanted.append(wanted)
        found: dict[Key, Found] = {
            ("overview", scope): Found(b"value: %d\n" % self.value, self.core) for scope in wanted.overviews
        }
        for search in wanted.searches:
            found["search", search] = Found(b"value: newer than %s\n" % search.newest.hex.encode(), self.core)
        return found


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_hub, "INTERVAL", 0.005)
    monkeypatch.setattr(feed_hub, "LEAST_PAUSE", 0.001)
    monkeypatch.setattr(feed_hub, "COMMENT_AFTER", 0.02)


async def _holds() -> bool:
    return True


async def _read(feed: Feed, interest: Interest, count: int) -> list[bytes]:
    """The first messages of a stream that are no beat."""
    got: list[bytes] = []
    async for chunk in feed.read(interest, last=None, session=None, version="v", holds=_holds):
        got += [line for line in chunk.split(b"\n") if line.startswith(b"value")]
        if len(got) >= count:
            break
    return got


def test_streams_of_one_thing_share_a_look() -> None:
    async def run() -> None:
        looks = Looks()
        feed = Feed(looks)
        interest = Interest(TENANTS[0], frozenset({"overview"}))
        await asyncio.gather(*(_read(feed, interest, 1) for _ in range(50)))
        assert all(list(wanted.overviews) == [TENANTS[0]] for wanted in looks.wanted)
        assert len(looks.wanted) < 10
        feed.close()

    asyncio.run(run())


class CountingFeed(Feed):
    """Counts the messages that are looked through for what changed."""

    looked_through = 0

    def _changed(self, keys: Iterable[Key], *, since: int, looked_after: int) -> list[bytes]:
        keys = list(keys)
        self.looked_through += len(keys)
        return super()._changed(keys, since=since, looked_after=looked_after)


def test_streams_that_show_the_same_share_what_is_sent_and_have_searches_of_their_own() -> None:
    async def run() -> None:
        looks, count = Looks(), 12
        feed = CountingFeed(looks)
        shown = [
            Interest(TENANTS[0], frozenset({"overview"}), search=Search(TENANTS[0], (), uuid4())) for _ in range(count)
        ]
        streams = [
            feed.read(interest, last=None, session=None, version="v", holds=_holds, is_gone=lambda: False)
            for interest in shown
        ]
        for stream in streams:
            await anext(stream)  # hello
        first = await asyncio.gather(*map(anext, streams))
        for interest, chunk in zip(shown, first, strict=True):
            assert interest.search is not None
            assert b"value: newer than %s\n" % interest.search.newest.hex.encode() in chunk
            assert chunk.count(b"value: ") == 2
        feed.looked_through = 0
        looks.value, looks.core = 1, 1
        changed = [await _value(stream, b"value: 1") for stream in streams]
        assert all(changed)
        ticks = feed._tick
        # Each stream looks for its search, and all of them together once a tick for the overview.
        assert feed.looked_through <= count * ticks + ticks
        feed.close()

    asyncio.run(run())


async def _value(stream: AsyncGenerator[bytes], value: bytes) -> bool:
    """Read on to the chunk that has a value."""
    async for chunk in stream:
        if value in chunk:
            return True
    return False


def test_every_tenant_has_its_turn_where_a_look_is_bounded() -> None:
    async def run() -> None:
        looks = Looks()
        feed = Feed(looks)
        await asyncio.gather(*(_read(feed, Interest(tenant, frozenset({"overview"})), 1) for tenant in TENANTS))
        assert max(len(wanted.overviews) for wanted in looks.wanted) == feed_hub.PACE["overview"][1] < len(TENANTS)
        feed.close()

    asyncio.run(run())


@pytest.mark.parametrize(("calm", "is_sent_again"), [(1000.0, False), (0.0, True)])
def test_figure_that_follows_the_clock_alone_waits_for_its_turn(
    monkeypatch: pytest.MonkeyPatch, calm: float, is_sent_again: bool
) -> None:
    monkeypatch.setattr(feed_hub, "CALM", calm)

    async def run() -> None:
        looks = Looks()
        feed = Feed(looks)
        stream = asyncio.create_task(_read(feed, Interest(None, frozenset({"overview"})), 2))
        while len(looks.wanted) < 20 and not stream.done():
            looks.value += 1
            await asyncio.sleep(0)
        assert stream.done() == is_sent_again
        looks.core += 1  # what does not follow the clock is sent at once
        assert len(await stream) == 2
        feed.close()

    asyncio.run(run())


def test_feed_goes_on_after_looks_that_failed() -> None:
    async def run() -> None:
        looks = Looks()
        looks.failures = 3
        feed = Feed(looks)
        assert await _read(feed, Interest(None, frozenset({"overview"})), 1) == [b"value: 0"]
        assert looks.failures == 0
        assert list(looks.wanted[0].overviews) == [None]
        feed.close()

    asyncio.run(run())


def test_stream_of_a_page_that_was_left_takes_no_place_and_ends() -> None:
    async def run() -> None:
        feed, left = Feed(Looks()), asyncio.Event()
        feeds = [
            feed.read(Interest(None), last=None, session="s", version="v", holds=_holds, is_gone=left.is_set)
            for _ in range(feed_hub.MOST_OF_ONE)
        ]
        for stream in feeds:
            await anext(stream)
            await anext(stream)
        assert not feed.has_room("s")
        assert feed.has_room("other")
        left.set()
        assert feed.has_room("s")
        for stream in feeds:
            assert [chunk async for chunk in stream] == []
        feed.close()

    asyncio.run(run())


def test_full_process_takes_no_more_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_hub, "MOST_STREAMS", 1)

    async def run() -> None:
        feed = Feed(Looks())
        assert feed.has_room(None)
        stream = feed.read(Interest(None), last=None, session=None, version="v", holds=_holds)
        await anext(stream)
        await anext(stream)
        assert not feed.has_room(None)
        await stream.aclose()
        assert feed.has_room(None)
        feed.close()
        assert not feed.has_room(None)

    asyncio.run(run())
