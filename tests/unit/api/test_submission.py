"""Waiting for an Idempotency-Key whose upload seems dead, on a clock that only the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from api import submission
from api.deps import Services
from jobs.queries.submission import Reservation, find_reservation, free_orphaned
from jobs.queries.tenants import Tenant
from jobs.requests import JobOptions

FIRST, SECOND = UUID(int=1), UUID(int=2)


@dataclass
class Key:
    """The transactions of a request that finds its key held. Each look at the key takes half a second."""

    orphaned: Callable[[float], bool]
    """Whether the first request's upload holds no lock, so many seconds after the beginning."""
    published_at: float
    now: float = 0.0
    freed_at: float | None = None
    settings: Any = field(default_factory=lambda: SimpleNamespace(max_wait=3600))

    async def transaction(self, query: object, *arguments: object) -> Reservation | None:
        assert self.now < 1000, "the key is waited for without end"
        if query is free_orphaned:
            self.freed_at = self.now
            return None
        if self.freed_at is not None:
            return Reservation(SECOND, None, is_ours=True)
        if query is find_reservation:
            self.now += 0.5
        if self.now >= self.published_at:
            return Reservation(FIRST, b"sha256", is_ours=False)
        return Reservation(FIRST, None, is_ours=False, is_orphaned=self.orphaned(self.now))


def reserve(key: Key, monkeypatch: pytest.MonkeyPatch) -> Reservation:
    monkeypatch.setattr(submission, "time", SimpleNamespace(monotonic=lambda: key.now))
    monkeypatch.setattr(submission, "KEY_POLL", 0)
    tenant = cast(Tenant, SimpleNamespace(id=UUID(int=3)))
    return asyncio.run(submission._reserve(cast(Services, key), tenant, JobOptions(model="demo"), "key", SECOND))


def test_key_is_kept_when_its_upload_loses_its_lock_for_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its session ended three times, and took its locks again after 1.5 s.
    key = Key(orphaned=lambda now: now % 2 != 0, published_at=6)
    assert reserve(key, monkeypatch).job_id == FIRST
    assert key.freed_at is None


def test_key_is_freed_when_its_upload_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key(orphaned=lambda now: now > 5, published_at=float("inf"))
    assert reserve(key, monkeypatch).is_ours
    assert key.freed_at == 5 + submission.DEAD_AFTER + 0.5  # at the next look
