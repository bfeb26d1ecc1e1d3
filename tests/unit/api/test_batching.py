"""Lookups in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from api.batching import Batcher


def test_burst_is_answered_by_two_looks() -> None:
    """The first look has the first key; the other 599 come in while it runs, and share the second."""
    looks: list[list[int]] = []

    async def look_up(keys: Collection[int]) -> dict[int, int]:
        looks.append(sorted(keys))
        await asyncio.sleep(0)
        return {key: key * key for key in keys if key != 7}

    async def burst() -> list[int | None]:
        batcher = Batcher(look_up)
        first = asyncio.create_task(batcher.get(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return [*await asyncio.gather(*(batcher.get(key % 300) for key in range(600))), await first]

    answers = asyncio.run(burst())
    assert looks == [[0], list(range(300))]
    assert answers == [None if key == 7 else key * key for key in [*range(300), *range(300), 0]]


def test_look_begins_after_its_question() -> None:
    """A question that comes in during a look is answered by the next one: what was written in between is seen."""
    stored = {"a": 1}
    gate = asyncio.Event()

    async def look_up(keys: Collection[str]) -> dict[str, int]:
        seen = dict(stored)
        await gate.wait()
        return seen

    async def ask() -> list[int | None]:
        batcher = Batcher(look_up)
        early = asyncio.create_task(batcher.get("a"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stored["a"] = 2
        late = asyncio.create_task(batcher.get("a"))
        await asyncio.sleep(0)
        gate.set()
        return [await early, await late]

    assert asyncio.run(ask()) == [1, 2]


def test_error_of_a_look_reaches_every_caller_and_the_next_look_is_made() -> None:
    errors = [OSError("away")]

    async def look_up(keys: Collection[str]) -> dict[str, int]:
        if errors:
            raise errors.pop()
        return {"a": 1}

    async def ask() -> None:
        batcher = Batcher(look_up)
        first = await asyncio.gather(batcher.get("a"), batcher.get("b"), return_exceptions=True)
        assert [type(error) for error in first] == [OSError, OSError]
        assert await batcher.get("a") == 1

    asyncio.run(ask())


def test_answer_survives_a_caller_that_hangs_up() -> None:
    gate = asyncio.Event()

    async def look_up(keys: Collection[str]) -> dict[str, int]:
        await gate.wait()
        return {"a": 1}

    async def ask() -> None:
        batcher = Batcher(look_up)
        gone, stays = asyncio.create_task(batcher.get("a")), asyncio.create_task(batcher.get("a"))
        await asyncio.sleep(0)
        gone.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await stays == 1

    asyncio.run(ask())
