"""Tasks end, even those whose libraries lose a cancellation."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from api import tasks


def test_end_tasks_ends_a_task_that_loses_its_first_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN", 0.01)

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def run() -> list[bool]:
        running = {asyncio.create_task(stubborn()), asyncio.create_task(asyncio.Event().wait())}
        await asyncio.sleep(0)  # both have begun
        async with asyncio.timeout(30):
            await tasks.end_tasks(running)
        return [task.cancelled() for task in running]

    assert asyncio.run(run()) == [True, True]


def test_end_tasks_drops_what_a_task_raised() -> None:
    async def fail() -> None:
        raise ValueError

    async def run() -> None:
        failed = asyncio.create_task(fail())
        await asyncio.sleep(0)
        await tasks.end_tasks([failed])

    asyncio.run(run())
