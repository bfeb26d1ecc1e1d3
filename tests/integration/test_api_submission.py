"""The order of a submission's last steps: stored, published, committed, and only then announced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, fields
from typing import Any
from uuid import UUID

from api.deps import Services
from api.submission import store
from jobs.database import connect_async
from jobs.requests import JobOptions, StagedLine
from jobs.settings import Settings
from tests.support.rows import MODEL, Rows


@dataclass
class Notifier:
    """Looks at each job from another connection, as the worker that it wakes would."""

    rows: Rows
    states: list[object] = field(default_factory=list)

    def notify(self, model: str, job_id: UUID) -> None:
        self.states.append([row.state for row in self.rows.query("SELECT state FROM jobs WHERE id = :id", id=job_id)])


def test_workers_are_notified_after_the_commit(rows: Rows) -> None:
    notifier = Notifier(rows)

    async def groups() -> AsyncIterator[list[StagedLine]]:
        yield [StagedLine(1, "first", 0, b'{"prompt":"1+1="}')]

    async def submit() -> None:
        settings = Settings(database_url=rows.database_url, database_pool_size=1)
        database = connect_async(settings, "pagemill tests")
        unused: dict[str, Any] = {each.name: None for each in fields(Services)}
        services = Services(**unused | {"settings": settings, "database": database, "notifier": notifier})
        await store(services, rows.tenant(), JobOptions(model=MODEL.name), None, groups(), bytes)
        await database.dispose()

    asyncio.run(submit())
    assert notifier.states == [["in_progress"]]
