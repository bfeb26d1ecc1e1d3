"""Transactions of the API over a pool of one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import TimeoutError as NoConnection

from api import transactions
from api.tasks import end_tasks
from api.transactions import Transactions
from jobs.database import connect_async
from jobs.settings import Settings

TRANSACTIONS = 20


def run(database_url: str, use: Callable[[Transactions], Awaitable[None]]) -> None:
    async def with_one_connection() -> None:
        settings = Settings(database_url=database_url, database_pool_size=1)
        one = Transactions(connect_async(settings, "pagemill tests"), settings.database_pool_size)
        try:
            await use(one)
        finally:
            await one.close()

    asyncio.run(with_one_connection())


def test_transactions_come_in_the_order_of_asking(database_url: str) -> None:
    """Although another one is asked for whenever the event loop turns, also while a connection comes back."""
    begun: list[int] = []

    def note(connection: Connection, number: int) -> None:
        connection.execute(text("SELECT 1"))
        begun.append(number)

    async def use(one: Transactions) -> None:
        asked: list[asyncio.Task[None]] = []
        while len(begun) < TRANSACTIONS:
            asked.append(asyncio.create_task(one.run(note, len(asked))))
            await asyncio.sleep(0)
        await end_tasks(asked)

    run(database_url, use)
    assert begun[:TRANSACTIONS] == list(range(TRANSACTIONS))


def test_wait_for_a_connection_ends(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "PATIENCE", 0.05)

    async def use(one: Transactions) -> None:
        def hold(connection: Connection) -> None:
            connection.execute(text("SELECT pg_sleep(3600)"))

        def nothing(connection: Connection) -> None:
            """Use the connection for nothing."""

        holding = asyncio.create_task(one.run(hold))
        await asyncio.sleep(0)  # it has the place
        with pytest.raises(NoConnection):
            await one.run(nothing)
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        await one.run(nothing)  # a task that is cancelled leaves its place

    run(database_url, use)
